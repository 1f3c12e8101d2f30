"""Methods `percentile`, `mse` and `entropy`: a fixed range, determined by the search of that name (see `ranges`).

The range of activations is found on the calibration data, that of a weight on its values then, per channel. Nothing is
learned or updated afterwards; in training, weights change on a fixed grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import EntropySpec, MSESpec, PercentileSpec, Role


@register(PercentileSpec)
@register(MSESpec)
@register(EntropySpec)
class StaticQuantizer(Quantizer):
    """Fixed scale and zero point (C,)."""

    spec: PercentileSpec | MSESpec | EntropySpec
    fixed_scale: Tensor
    fixed_zero_point: Tensor

    def __init__(self, spec: PercentileSpec | MSESpec | EntropySpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        one = torch.ones(self.num_channels)
        self.register_buffer("fixed_scale", one)
        self.register_buffer("fixed_zero_point", self.grid.zero_point(-one, one))

    def _initialize(self, observed: Distribution) -> None:
        scale, zero_point = self.grid.from_bounds(*initial_bounds(observed, self.spec, self.grid))
        self.fixed_scale.copy_(scale)
        self.fixed_zero_point.copy_(zero_point)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        return self.fixed_scale, self.fixed_zero_point
