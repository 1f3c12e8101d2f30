"""Semi-supervised tracking: which masks prompt, and the same masks as the stock predictor."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2_video_predictor
from small_models import seeing

from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.evaluation.mask_files import score_folders, write_masks
from qsam2.evaluation.metrics.scores import Protocol
from qsam2.evaluation.tracking import first_masks, score_videos, track, true_masks
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe

HEIGHT, WIDTH = 48, 80
LENGTH = 6


def blob(left: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[12:36, left : left + 24] = True
    return mask


class Blobs(Video):
    """Object 1 from frame 1 on, object 3 from frame 3 on; frames 0 and 2 are not annotated."""

    name, size = "blobs", (HEIGHT, WIDTH)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.frame_names = [f"{index:05d}" for index in range(LENGTH)]
        noise = np.random.default_rng(0)
        for index, name in enumerate(self.frame_names):
            picture = noise.integers(0, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            picture[blob(8 + index)] += 120
            picture[blob(40 - index)] //= 2
            Image.fromarray(picture).save(folder / f"{name}.jpg")

    def frame(self, index: int) -> np.ndarray:
        return np.array(Image.open(self.folder / f"{self.frame_names[index]}.jpg"))

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        if index in (0, 2):
            return None
        return {1: blob(8 + index), 3: blob(40 - index) if index >= 3 else np.zeros(self.size, dtype=bool)}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    return Blobs(tmp_path_factory.mktemp("blobs"))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (LENGTH, {1: {1: blob(9)}, 3: {3: blob(37)}}),
        (3, {1: {1: blob(9)}}),  # looks no further than it is told
    ],
)
def test_prompts_are_first_masks(video: Blobs, length: int, expected: dict) -> None:
    prompts = first_masks(video, length)
    assert {frame: masks.keys() for frame, masks in prompts.items()} == {f: m.keys() for f, m in expected.items()}
    for frame, masks in expected.items():
        assert all(np.array_equal(prompts[frame][item], mask) for item, mask in masks.items())


def test_a_video_without_masks_is_an_error(video: Blobs) -> None:
    with pytest.raises(UserError, match=r"^video blobs: no mask to start from in its first 1 frames$"):
        first_masks(video, 1)


def test_true_masks_are_those_of_annotated_frames(video: Blobs) -> None:
    annotated, truth = true_masks(video, 3, LENGTH)
    assert annotated == [1, 3, 4, 5]
    assert np.array_equal(truth, [0 * blob(0), blob(37), blob(36), blob(35)])
    assert not true_masks(video, 7, LENGTH)[1].any()  # an object that is never there


def test_masks_are_those_of_the_stock_predictor(video: Blobs) -> None:
    tiny, masks = seeing("tiny"), {1: blob(8), 3: blob(40)}
    attentions = [f"++model.memory_attention.layer.{kind}_attention.feat_sizes=[4,4]" for kind in ("self", "cross")]
    stock = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        ckpt_path=None,
        device="cpu",
        apply_postprocessing=False,
        hydra_overrides_extra=["++model.image_size=64", *attentions],
    )
    stock.load_state_dict(tiny.state_dict())
    for non_overlapping in (True, False):
        ours = track(tiny, video, {0: masks}, length=LENGTH, non_overlapping=non_overlapping)
        stock.non_overlap_masks = non_overlapping
        state = stock.init_state(str(video.folder))
        for object_id, mask in masks.items():
            stock.add_new_mask(state, 0, object_id, torch.from_numpy(mask))
        frames = [(ids, logits[:, 0] > 0) for _, ids, logits in stock.propagate_in_video(state)]
        assert all(ids == list(ours) for ids, _ in frames)
        for index, found in enumerate(ours.values()):
            assert 0.02 < found[1:].mean() < 0.98  # neither nothing nor everything
            assert np.array_equal(found, [shown[index] for _, shown in frames])
        assert (ours[1] & ours[3]).any() != non_overlapping


def test_nothing_before_the_prompt(model: SAM2, video: Blobs) -> None:
    before = {name: value for name, value in vars(model).items() if isinstance(value, (bool, int, float))}
    tracked = track(model, video, {0: {1: blob(8)}, 3: {3: blob(37)}}, length=LENGTH, non_overlapping=False)
    assert tracked[1].shape == tracked[3].shape == (LENGTH, HEIGHT, WIDTH)
    assert not tracked[3][:3].any()
    assert tracked[3][3:].any(axis=(1, 2)).all()
    alone = track(model, video, {0: {1: blob(8)}}, length=LENGTH, non_overlapping=True)
    assert np.array_equal(tracked[1], alone[1])  # objects do not see one another
    assert {name: getattr(model, name) for name in before} == before  # the model is left as it was


def test_objects_of_two_passes_do_not_overlap(model: SAM2, video: Blobs) -> None:
    """A pixel of two passes belongs to the lowest id, as in the masks that are written."""
    prompts = {0: {3: blob(8)}, 1: {1: blob(20)}}
    free = track(model, video, prompts, length=LENGTH, non_overlapping=False)
    assert (free[1] & free[3]).any()
    tracked = track(model, video, prompts, length=LENGTH, non_overlapping=True)
    assert np.array_equal(tracked[1], free[1])
    assert np.array_equal(tracked[3], free[3] & ~free[1])


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_a_late_object_has_one_score_on_both_paths(
    model: SAM2, video: Blobs, tmp_path: Path, protocol: Protocol, caplog: pytest.LogCaptureFixture
) -> None:
    """Object 3 is prompted on frame 3; object 7 comes too late. Masks on disk score as the model that wrote them."""
    shown = copy.copy(video)
    late = {LENGTH - 1: {7: blob(0)}}
    shown.masks = lambda index: (masks := video.masks(index)) and masks | late.get(index, {})  # type: ignore[method-assign]
    evaluation = EvaluateRecipe(protocol=protocol)
    block, masks = score_videos(model, [shown], evaluation, TrainerRecipe(accelerator="cpu", devices=1), silent=True)
    assert list(block["per_object"]["blobs"]) == ["1", "3"]
    assert (
        block["scored"] == {"videos": 1, "frames": 2 if protocol == "davis" else 3, "objects": 2} or protocol == "sav"
    )
    assert list(block["left_out"]) == ["blobs"] and "object 7 " in str(block["left_out"]["blobs"])
    assert "not scored: blobs: object 7 " in caplog.text
    write_masks(tmp_path / "pred", [shown], masks, evaluation)
    truth = {
        ("blobs", item): np.packbits([shown_at(shown, index, item) for index in range(LENGTH)]) for item in (1, 3, 7)
    }
    write_masks(tmp_path / "gt", [shown], truth, evaluation)
    for index in (0, 2):  # not annotated
        for file in (tmp_path / "gt").rglob(f"{shown.frame_names[index]}.png"):
            file.unlink()
    found = score_folders(tmp_path / "pred", tmp_path / "gt", protocol)
    assert {key: found[key] for key in ("J&F", "J", "F", "scored")} == {
        key: block[key] for key in ("J&F", "J", "F", "scored")
    }
    assert list(found["per_object"]["blobs"].values()) == list(block["per_object"]["blobs"].values())


def shown_at(video: Video, index: int, item: int) -> np.ndarray:
    return (video.masks(index) or {}).get(item, np.zeros(video.size, bool))


def test_length_cuts_the_video(model: SAM2, video: Blobs) -> None:
    longer = copy.copy(video)  # below 16 frames sam2 encodes pointers by the video's length
    longer.frame_names = 3 * video.frame_names
    short = track(model, longer, {0: {1: blob(8)}}, length=16, non_overlapping=False)
    long = track(model, longer, {0: {1: blob(8)}}, length=18, non_overlapping=False)
    assert len(short[1]) == 16 and np.array_equal(short[1], long[1][:16])
