"""Methods whose range calibration finds: `minmax`, `percentile`, `mse` and `entropy`; nothing is learned.

`minmax` follows the tensor. Weights: min w, max w of each forward. Activations: exponential moving averages of the
batches' min and max, m <- momentum * m + (1 - momentum) * batch (common practice in quantization-aware training).
Ours: with `range` percentile or mse, the bounds are the fractions of min and max that were best at calibration.

The others keep the range that the search of their name determined (see `ranges`): that of activations on the
calibration data, that of a weight on its values then, per channel. In training, weights change on a fixed grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer, register
from qsam2.quantizers.observers import Distribution, extremes, update_running
from qsam2.quantizers.ranges import initial_bounds
from qsam2.recipe.quantizer_specs import EntropySpec, MinMaxSpec, MSESpec, PercentileSpec


@register(MinMaxSpec)
class MinMaxQuantizer(Quantizer):
    """Running min and max (C,), and the fraction of each that the range keeps."""

    statistics = ("minimum", "maximum", "kept_minimum", "kept_maximum")

    spec: MinMaxSpec
    minimum: Tensor
    maximum: Tensor
    kept_minimum: Tensor
    kept_maximum: Tensor

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


@register(PercentileSpec)
@register(MSESpec)
@register(EntropySpec)
class StaticQuantizer(Quantizer):
    """Fixed scale and zero point (C,)."""

    statistics = ("fixed_scale", "fixed_zero_point")

    spec: PercentileSpec | MSESpec | EntropySpec
    fixed_scale: Tensor
    fixed_zero_point: Tensor

    def _initialize(self, observed: Distribution) -> None:
        scale, zero_point = self.grid.from_bounds(*initial_bounds(observed, self.spec, self.grid))
        self.fixed_scale.copy_(scale)
        self.fixed_zero_point.copy_(zero_point)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        return self.fixed_scale, self.fixed_zero_point
