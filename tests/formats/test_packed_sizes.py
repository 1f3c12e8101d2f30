"""Whole models at every number of bits: a loaded packed file tracks as the fake-quantized model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import seeing
from small_packed import assert_equal
from torch import Tensor

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.formats.packed import load_packed, model_bytes, save_packed
from qsam2.layers.convert import convert, finalize
from qsam2.models import SAM2, build_sam2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec

SIZE_PX = 64


def track(model: SAM2) -> Tensor:
    """Mask logits (2, 2, 1, H, W) of two objects on two frames of noise, of all parts of the model."""
    frames = torch.randn(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    state = model.init_state(list(frames), video_size=(SIZE_PX, SIZE_PX))
    model.add_new_mask(state, 0, 1, torch.eye(SIZE_PX, dtype=torch.bool))
    model.add_new_points_or_box(state, 0, 2, points=[[20.0, 30.0]], labels=[1])
    return torch.stack([logits for _, _, logits in model.propagate_in_video(state)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "bits"),
    [
        *(("nano", bits) for bits in range(2, 9)),
        *(pytest.param("tiny", bits, marks=() if bits == 3 else pytest.mark.prove) for bits in range(2, 9)),
    ],
)
def test_a_loaded_model_tracks_as_the_fake_quantized_one(tmp_path: Path, size: str, bits: int) -> None:
    quantize = QuantizeRecipe(weights=MinMaxSpec(bits=bits), activations=MinMaxSpec(bits=bits))
    model, path = seeing(size, SIZE_PX).eval(), tmp_path / "model.safetensors"
    convert(model, quantize)
    find_ranges(model, track, [model])
    finalize(model)
    save_packed(path, model, {"quantize": quantize.model_dump(mode="json")})
    loaded = build_sam2(size, image_size=SIZE_PX).eval()
    load_packed(path, loaded)
    assert_equal(loaded, model)
    masks = track(model)
    assert masks.std() > 0 and torch.equal(track(loaded), masks)
    sizes = model_bytes(model)
    assert sizes["float32"] == 2 * sizes["bfloat16"] and sizes["packed"] < 1.3 * sizes["float32"] * bits / 32
