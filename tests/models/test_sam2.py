"""Our one class against `sam2`'s own."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from sam2.build_sam import build_sam2 as stock_build
from sam2.sam2_video_predictor import SAM2VideoPredictor

from qsam2.errors import UserError
from qsam2.models.sam2 import VERSIONS, build_sam2, model_config

LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
PARAMETERS_MILLION = {"tiny": 38.9, "small": 46.0, "base_plus": 80.8, "large": 224.4}  # SAM 2.1's README


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", LETTERS)
def test_official_sizes_have_the_keys_and_shapes_of_sam2(size, version):
    stock = stock_build(f"configs/sam{version}/sam{version}_hiera_{LETTERS[size]}.yaml", device="cpu").state_dict()
    ours = build_sam2(size, version=version)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {name: t.shape for name, t in stock.items()}
    if version == "2.1":
        millions = sum(p.numel() for p in ours.parameters()) / 1e6
        assert millions == pytest.approx(PARAMETERS_MILLION[size], abs=0.1)


def test_nano_is_small_and_has_every_module():
    nano, tiny = build_sam2("nano"), build_sam2("tiny")
    assert {name for name, _ in nano.named_children()} == {name for name, _ in tiny.named_children()}
    assert 2e6 < sum(p.numel() for p in nano.parameters()) < 8e6
    for option in ("use_high_res_features_in_sam", "pred_obj_scores", "use_obj_ptrs_in_encoder", "num_maskmem"):
        assert getattr(nano, option) == getattr(tiny, option)


@torch.no_grad()
@pytest.mark.parametrize("side", [192, 320])
def test_coarse_stages_of_nano_see_the_whole_image(side):
    trunk, image = build_sam2("nano", image_size=side).image_encoder.trunk, torch.zeros(1, 3, side, side)
    before = trunk(image)
    image[..., :8, :8] = 1
    change = [float((a - b)[..., -1, -1].abs().max()) for a, b in zip(before, trunk(image), strict=True)]
    assert change[0] == change[1] == 0 < min(change[2:])  # at the opposite corner


def test_tracks_bit_for_bit_as_the_stock_predictor(frames):
    ours = build_sam2("nano")
    config = model_config("nano")
    del config["decoder_mlp_dim"]
    config._target_ = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    stock = instantiate(config).eval()
    stock.sam_mask_decoder.transformer = build_sam2("nano").sam_mask_decoder.transformer
    stock.load_state_dict(ours.state_dict())
    mask = np.zeros((60, 80), dtype=bool)
    mask[20:40, 20:50] = True

    stock_state = ours.init_state(frames, video_size=(60, 80))  # stock has no way in for frames in memory
    ours_state = ours.init_state(frames, video_size=(60, 80))
    for model, state in ((stock, stock_state), (ours, ours_state)):
        SAM2VideoPredictor.add_new_mask(model, state, 0, 1, mask)
        model.add_new_points_or_box(state, 0, 2, points=[[30, 30]], labels=[1])
    pairs = zip(stock.propagate_in_video(stock_state), ours.propagate_in_video(ours_state), strict=True)
    for (t, ids, theirs), (_, _, mine) in pairs:
        assert ids == [1, 2]
        assert torch.equal(theirs, mine), f"frame {t} differs"


def test_frames_in_memory_need_the_video_size(frames):
    with pytest.raises(ValueError, match="video_size"):
        build_sam2("nano").init_state(frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "tinny"}, "did you mean 'tiny'"),
        ({"size": "tiny", "version": "3"}, "model.version='3'"),
        ({"size": "nano", "version": "2"}, "model.version='2' is unknown for size nano"),
        ({"size": "tiny", "image_size": 1000}, "multiple of 32"),
        ({"size": "tiny", "image_size": 32}, "from 64 to 4096"),
    ],
)
def test_impossible_models_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        build_sam2(**arguments)
