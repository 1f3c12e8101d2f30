"""Small calibration data and recipes, for tests of calibration and reconstruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.data.calibration_data import CalibrationData
from qsam2.data.clips import Source
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.layers.convert import convert
from qsam2.models import SAM2, build_sam2
from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.recipe.quantize import QuantizeRecipe

SIZE_PX = 64


def quantize(bits: int = 4, **changes: Any) -> QuantizeRecipe:
    """Min-max weights and activations, unless `changes` say otherwise."""
    spec = {"method": "minmax", "bits": bits}
    return QuantizeRecipe.model_validate({"weights": spec, "activations": spec, **changes})


def calibration_data(
    videos: int = 4, *, seed: int = 0, max_objects: int = 1, max_stride: int = 1, **amount: int
) -> CalibrationData:
    """2 stills and 2 clips of 2 frames, unless `amount` says otherwise."""
    recipe = CalibrateRecipe.model_validate({"stills": 2, "clips": 2, "num_frames": 2, **amount})
    sources = [Source(list(moving_objects("train", videos)))]
    more = {"max_objects": max_objects, "max_stride": max_stride, "seed": seed}
    return CalibrationData(sources, recipe, image_size=SIZE_PX, **more)


def converted_nano(bits: int = 4, **changes: Any) -> SAM2:
    """nano with random weights, converted as `quantize` says."""
    torch.manual_seed(0)
    model = build_sam2("nano", image_size=SIZE_PX)
    convert(model, quantize(bits, **changes))
    return model


@torch.no_grad()
def relative_error(outputs: Tensor, expected: Tensor, *, centred: bool = True) -> float:
    """Mean squared difference of outputs (N, m), over their variance or, not centred, their energy."""
    energy = expected - expected.mean(0) if centred else expected
    return float((outputs - expected).square().sum(1).mean() / energy.square().sum(1).mean())


def on_grid(layer: nn.Linear, bits: int = 4) -> Tensor:
    """Weight of a float layer, rounded on its min-max grid per channel."""
    largest = 2 ** (bits - 1) - 1
    step = layer.weight.abs().amax(1, keepdim=True) / largest
    return (layer.weight / step).round().clamp(-largest, largest) * step
