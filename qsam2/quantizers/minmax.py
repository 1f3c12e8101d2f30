"""Quantization by min and max of the tensor.

Weights: min w, max w of each forward. Activations: exponential moving averages of the batches' min and max,
m <- momentum * m + (1 - momentum) * batch (common practice in quantization-aware training).
Ours: with `range` percentile or mse, the bounds are the fractions of min and max that were best at calibration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.observers import Distribution, extremes, update_running
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import MinMaxSpec, Role


@register(MinMaxSpec)
class MinMaxQuantizer(Quantizer):
    """Running min and max (C,), and the fraction of each that the range keeps."""

    spec: MinMaxSpec
    minimum: Tensor
    maximum: Tensor
    kept_minimum: Tensor
    kept_maximum: Tensor

    def __init__(self, spec: MinMaxSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.register_buffer("minimum", -torch.ones(self.num_channels))
        self.register_buffer("maximum", torch.ones(self.num_channels))
        self.register_buffer("kept_minimum", torch.ones(self.num_channels))
        self.register_buffer("kept_maximum", torch.ones(self.num_channels))

    def _initialize(self, observed: Distribution) -> None:
        lower, upper = initial_bounds(observed, self.spec, self.grid)
        self.minimum.copy_(observed.minimum)
        self.maximum.copy_(observed.maximum)
        self.kept_minimum.copy_(_kept(lower, observed.minimum.clamp(max=0.0)))
        self.kept_maximum.copy_(_kept(upper, observed.maximum.clamp(min=0.0)))

    def _update_statistics(self, x: Tensor) -> None:
        weight = self.role == "weight"
        minimum, maximum = extremes(x, self._observed_dim, over_ranks=not weight)
        momentum = 0.0 if weight else self.spec.momentum
        update_running(self.minimum, minimum, momentum)
        update_running(self.maximum, maximum, momentum)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        return self.grid.from_bounds(self.minimum * self.kept_minimum, self.maximum * self.kept_maximum)


def _kept(bound: Tensor, extreme: Tensor) -> Tensor:
    """Fraction bound / extreme (C,); 1 if the extreme is zero or a symmetric bound exceeds it."""
    return torch.where(extreme == 0, 1.0, bound / extreme).clamp(0.0, 1.0)
