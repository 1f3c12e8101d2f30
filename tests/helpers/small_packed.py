"""A small module with one layer of each kind, quantized and finalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.convert import convert, finalize, quantizers
from qsam2.quantizers import QuantizerState
from qsam2.recipe.quantize import QuantizeRecipe


class Small(nn.Module):
    """One layer of each kind; the last one is kept in float by the recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.up = nn.ConvTranspose2d(5, 7, 2, stride=2)
        self.norm = nn.LayerNorm(7)
        self.linear = nn.Linear(7, 3)
        self.last = nn.Linear(3, 2)
        self.register_buffer("frequencies", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.conv(x))).permute(0, 2, 3, 1)
        return self.last(self.linear(self.norm(x)) * self.frequencies)


def recipe(bits: int, method: str = "lsq", **weights: Any) -> dict[str, Any]:
    spec = {"method": method, "bits": bits, "range": "minmax"}
    rules = [
        {"match": "last", "keep_float": True},
        {"match": "conv", "bits": 8},
        {"match": "depthwise", "weight_bits": 5},
    ]
    return {"name": "test", "quantize": {"weights": {**spec, **weights}, "activations": spec, "rules": rules}}


def finalized(model: nn.Module, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    model = model.to(dtype)
    convert(model, QuantizeRecipe.model_validate(values["quantize"]))
    model.eval()
    find_ranges(model, model, [torch.randn(2, 3, 6, 6, dtype=dtype)])
    finalize(model)
    return model


def assert_equal(loaded: nn.Module, model: nn.Module) -> None:
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        if not name.endswith(("log_scale", "log_alpha")):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    for (name, mine), (_, other) in zip(quantizers(loaded), quantizers(model), strict=True):
        assert mine.state is QuantizerState.FROZEN and mine.calibrated
        assert torch.equal(mine.scale, other.scale) and torch.equal(mine.zero_point, other.zero_point), name
