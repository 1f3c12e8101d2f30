"""The first range of a quantizer, from what calibration observed."""

from __future__ import annotations

import torch
from torch import Tensor

from qsam2.quantizers.entropy import least_divergence_ratio
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.mse import best_bounds
from qsam2.quantizers.observers import Distribution
from qsam2.recipe.quantizer_specs import RangedSpec


def initial_bounds(seen: Distribution, spec: RangedSpec, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) by `spec.range`: minmax, percentile, mse or entropy."""
    lower, upper = seen.minimum.clamp(max=0.0), seen.maximum.clamp(min=0.0)
    if spec.range == "minmax":
        return lower, upper
    if spec.range == "percentile":
        return percentile_bounds(seen, spec.percentile, grid.symmetric)
    if spec.range == "mse":
        return best_bounds(seen, grid)
    if spec.range != "entropy":
        raise ValueError(f"range={spec.range} gives no bounds")
    ratio = least_divergence_ratio(seen, grid, lambda ratio: (lower * ratio, upper * ratio))
    return lower * ratio, upper * ratio


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
