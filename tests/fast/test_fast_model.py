"""A model made fast beside the one it was made of: the same numbers in float32, nearly the same masks in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sam2 import sam2_video_predictor
from small_predictors import SIZE_PX, pictures, random_nano, square, write_folder
from torch import Tensor, nn

import qsam2
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.cli import main
from qsam2.data.index_masks import read_ids
from qsam2.data.transforms import to_model_input
from qsam2.errors import UserError
from qsam2.evaluation.scoring import evaluate_model
from qsam2.fast import model as fast_model
from qsam2.fast.model import FastSAM2, fast_dtype, make_fast
from qsam2.layers.attention import QuantizedAttention
from qsam2.layers.convert import convert, finalize, quantizers
from qsam2.layers.weight import QuantizedLayer
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2, build_sam2, load_sam2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.recipe import MemoryRecipe

BFLOAT16 = torch.bfloat16
LENGTH = 10
EXACT = MemoryRecipe(cache=True)
SHARED = MemoryRecipe(cache=True, sharing="adaptive", frames=3, bounded=True)
PLAIN = {nn.Linear, nn.Conv2d, nn.ConvTranspose2d}


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2_video_predictor, "tqdm", lambda frames, **_: frames)


@pytest.fixture(scope="module")
def nano() -> SAM2:
    """Our trained nano: its masks mean something."""
    return load_sam2("nano")


def quantized(model: SAM2, bits: int, frames: Sequence[Tensor]) -> SAM2:
    """A finalized copy, calibrated on what it tracks."""
    model = copy.deepcopy(model)
    spec = {"method": "minmax", "bits": bits, "range": "mse"}
    convert(model, QuantizeRecipe(weights=spec, activations=spec))
    with torch.no_grad():
        find_ranges(model, lambda _: track(model, frames), [None])
    finalize(model)
    return model


def clip(side: int, length: int = LENGTH) -> list[Tensor]:
    return [to_model_input(picture, side) for picture in pictures(length, side, side)]


def track(model: SAM2, frames: Sequence[Tensor], memory: MemoryRecipe | None = None) -> Tensor:
    """Logits (frames, H, W) of the bright square."""
    if memory is not None:
        use_memory(model, memory)
    side = model.image_size
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[12:30, 8:30] = True
    state = model.init_state(frames, video_size=(side, side))
    model.add_new_mask(state, 0, 1, mask)
    return torch.stack([logits[0, 0] for _, _, logits in model.propagate_in_video(state)])


def iou(logits: Tensor, others: Tensor) -> float:
    """The worst frame's."""
    masks, theirs = logits > 0, others > 0
    union = (masks | theirs).sum((1, 2)).clamp(min=1)
    return float(((masks & theirs).sum((1, 2)) / union).min())


@pytest.mark.parametrize("memory", [MemoryRecipe(), EXACT, SHARED], ids=["sam2", "cache", "shared"])
def test_float32_changes_nothing(memory: MemoryRecipe) -> None:
    model = random_nano()
    fast = make_fast(copy.deepcopy(model), torch.float32)
    expected = track(model, clip(SIZE_PX), memory)
    assert 0.01 < (expected > 0).float().mean() < 0.99
    torch.testing.assert_close(track(fast, clip(SIZE_PX), memory), expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_near(nano: SAM2) -> None:
    frames = clip(nano.image_size, 7)
    expected = track(copy.deepcopy(nano), frames)
    assert iou(expected, expected.roll(1, 0)) < 0.95  # it moves: another frame's masks would not do
    fast = make_fast(copy.deepcopy(nano), BFLOAT16)
    assert iou(track(fast, frames, EXACT), expected) > 0.97
    assert iou(track(fast, frames, SHARED), expected) > 0.95


@pytest.mark.parametrize(("bits", "least"), [(8, 0.95), (4, 0.75)])
def test_a_quantized_model_tracks_as_its_fake_quantized_self(nano: SAM2, bits: int, least: float) -> None:
    frames = clip(nano.image_size, 5)
    model = quantized(nano, bits, frames[:3])
    expected = track(model, frames)
    assert iou(track(make_fast(model, BFLOAT16), frames, EXACT), expected) > least


def test_nothing_is_fake_quantized_and_parts_have_their_precision() -> None:
    model = quantized(random_nano(), 4, clip(SIZE_PX, 2))
    name = "memory_attention.layers.0.self_attn.q_proj"
    weight = model.get_submodule(name).weight.clone()
    fast = make_fast(model, BFLOAT16)
    assert not list(quantizers(fast)) and not any(isinstance(module, QuantizedLayer) for module in fast.modules())
    assert not any(type(module).__name__.startswith("Quant") for module in fast.modules())
    assert sum(isinstance(module, QuantizedAttention) for module in fast.modules()) > 10
    layer = fast.get_submodule(name)
    assert type(layer) is nn.Linear and torch.equal(layer.weight, weight.to(BFLOAT16))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    for name, module in fast.named_modules():
        if type(module) in PLAIN:
            low = name.startswith(fast_model.LOW_PRECISION)
            assert module.weight.dtype == (BFLOAT16 if low else torch.float32), name
    features = fast.forward_image(torch.zeros(1, 3, SIZE_PX, SIZE_PX))
    assert {level.dtype for level in features["backbone_fpn"]} == {torch.float32}


def test_other_frame_sizes_have_their_own_positions() -> None:
    model = build_sam2("nano", image_size=SIZE_PX)
    fast = make_fast(copy.deepcopy(model), torch.float32)
    for side in (SIZE_PX, 2 * SIZE_PX, SIZE_PX):
        picture = torch.randn(1, 3, side, side)
        expected = model.image_encoder(picture)["vision_features"]
        torch.testing.assert_close(fast.image_encoder(picture)["vision_features"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("avx", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_only_where_the_processor_has_it(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: avx and not including_emulation)
    expected = BFLOAT16 if avx or amx else torch.float32
    assert fast_dtype(torch.device("cpu")) == expected
    assert fast_dtype(torch.device("cuda")) == (BFLOAT16 if avx else torch.float32)
    assert make_fast(build_sam2("nano", image_size=SIZE_PX)).fast_dtype == expected


def test_an_uncalibrated_model_is_refused() -> None:
    model = build_sam2("nano", image_size=SIZE_PX)
    convert(model, QuantizeRecipe(weights={"method": "minmax", "bits": 4}))
    with pytest.raises(UserError, match="needs a range, calibrate it first"):
        make_fast(model)


# What a user calls


@pytest.mark.parametrize("kind", ["float", "packed"])
def test_predictors_and_the_cache_that_they_have(kind: str, models: dict[str, Path]) -> None:
    predictor = qsam2.video_predictor(models[kind], fast=True)
    assert isinstance(predictor, FastSAM2) and predictor.memory_bound is not None
    assert predictor.memory_reader is not None and predictor.memory_reader.recipe == MemoryRecipe(
        cache=True, bounded=True
    )
    without = qsam2.video_predictor(models[kind], ["memory.cache=false"], fast=True)
    assert without.memory_reader is None
    picture = pictures(1)[0]
    found: list[Any] = []
    for fast in (False, True):
        images = qsam2.image_predictor(models[kind], fast=fast)
        images.set_image(picture)
        found.append(images.predict(point_coords=np.array([[20.0, 20.0]]), point_labels=np.array([1]))[0] > 0)
    assert (found[0] == found[1]).mean() > 0.95


def test_predict_fast(models: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "frames", pictures(4))
    mask = tmp_path / "mask.png"
    Image.fromarray(square().astype(np.uint8)).save(mask)
    masks = {}
    for flags in ([], ["--fast"]):
        out = tmp_path / f"out{len(flags)}"
        given = [str(models["packed"]), str(folder), "--mask", str(mask), "--out", str(out), *flags]
        assert main(["predict", *given]) == 0
        masks[len(flags)] = [read_ids(path) for path in sorted((out / "masks").iterdir())]
    assert len(masks[1]) == 4
    assert np.mean([(slow == fast).mean() for slow, fast in zip(masks[0], masks[1], strict=True)]) > 0.95


def test_evaluate_fast_scores_a_fast_model_and_keeps_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    make = make_fast
    monkeypatch.setattr("qsam2.evaluation.scoring.make_fast", lambda model: seen.append(make(model)) or seen[-1])
    cache = tmp_path / "kept"
    overrides = ["data.val=moving_objects:1:test", "evaluate.frames=4", f"evaluate.float_cache={cache}"]
    block = evaluate_model("nano", overrides, fast=True)
    assert block["J&F"] > 50 and len(seen) == 1 and not cache.exists()


def test_fast_is_nothing_for_masks_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--pred", "masks", "--gt", "truth", "--fast"]) == 2
    assert "--fast does nothing with --pred and --gt" in capsys.readouterr().err
