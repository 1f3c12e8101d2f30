"""The first range of a quantizer: from what calibration saw to lower and upper bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qsam2.quantizers.distribution import Distribution
from qsam2.quantizers.fake_quant import to_levels
from qsam2.quantizers.grid import Grid
from qsam2.recipe.quantizers import QuantizerSpec

CLIP_RATIOS = 100
ERROR_POWER = 2.4


def initial_bounds(seen: Distribution, spec: QuantizerSpec, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) by `spec.range`: minmax, percentile, or mse (see `best_clip_ratio`)."""
    lower, upper = seen.minimum.clamp(max=0.0), seen.maximum.clamp(min=0.0)
    if spec.range == "minmax":
        return lower, upper
    if spec.range == "percentile":
        return percentile_bounds(seen, spec.percentile, grid.symmetric)
    if spec.range == "mse":
        ratio = best_clip_ratio(seen, grid, lambda ratio: (lower * ratio, upper * ratio))
        return lower * ratio, upper * ratio
    raise ValueError(f"range={spec.range} gives no bounds")


def percentile_bounds(seen: Distribution, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Bounds that leave out (100 - percentile) % of the values at each end; symmetric: of the magnitudes."""
    if symmetric:
        bound = _quantile(seen.values.abs(), seen.counts, percentile / 100.0)
        return -bound, bound
    lower = -_quantile(-seen.values, seen.counts, percentile / 100.0)
    return lower.clamp(max=0.0), _quantile(seen.values, seen.counts, percentile / 100.0).clamp(min=0.0)


def _quantile(values: Tensor, counts: Tensor, fraction: float) -> Tensor:
    """Smallest value (C,) that at least `fraction` of the counts do not exceed."""
    values, order = values.sort(dim=1)
    cumulative = counts.gather(1, order).double().cumsum(dim=1)
    position = torch.searchsorted(cumulative, fraction * cumulative[:, -1:])
    return values.gather(1, position.clamp(max=values.shape[1] - 1)).squeeze(1)


def best_clip_ratio(seen: Distribution, grid: Grid, bounds: Callable[[float], tuple[Tensor, Tensor]]) -> Tensor:
    """The ratio (C,) of 1/100 ... 1 whose `bounds(ratio)` have the least mean |Q(x) - x|^2.4 (1.0 among equals)."""
    best_error = torch.full_like(seen.minimum, float("inf"))
    best = torch.ones_like(seen.minimum)
    for step in range(CLIP_RATIOS, 0, -1):
        ratio = step / CLIP_RATIOS
        scale, zero_point = (row[:, None] for row in grid.from_bounds(*bounds(ratio)))
        levels = to_levels(seen.values, scale, grid.qmin - zero_point, grid.qmax - zero_point, grid.mid_rise)
        error = levels.mul_(scale).sub_(seen.values).abs_().pow_(ERROR_POWER).mul_(seen.counts).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, ratio, best)
    return best
