"""First range of a quantizer, from the distribution that calibration observed: minmax, percentile, mse or entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from qsam2.quantizers.entropy import least_divergence_ratio
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.mse import best_bounds
from qsam2.quantizers.observers import Distribution
from qsam2.recipe.quantizer_specs import RangedSpec


def initial_bounds(observed: Distribution, spec: RangedSpec, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) by `spec.range`: minmax, percentile, mse or entropy."""
    lower, upper = observed.minimum.clamp(max=0.0), observed.maximum.clamp(min=0.0)
    if spec.range == "minmax":
        return lower, upper
    if spec.range == "percentile":
        return percentile_bounds(observed, spec.percentile, grid.symmetric)
    if spec.range == "mse":
        return best_bounds(observed, grid)
    if spec.range != "entropy":
        raise ValueError(f"range={spec.range} gives no bounds")
    ratio = least_divergence_ratio(observed, grid, lambda ratio: (lower * ratio, upper * ratio))
    return lower * ratio, upper * ratio


def percentile_bounds(observed: Distribution, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Bounds that cut off (100 - percentile) % of the values at each end; symmetric: of the magnitudes."""
    if symmetric:
        bound = _quantile(observed.values.abs(), observed.counts, percentile / 100.0)
        return -bound, bound
    lower = -_quantile(-observed.values, observed.counts, percentile / 100.0)
    return lower.clamp(max=0.0), _quantile(observed.values, observed.counts, percentile / 100.0).clamp(min=0.0)


def _quantile(values: Tensor, counts: Tensor, fraction: float) -> Tensor:
    """Smallest value (C,) such that at least `fraction` of the counts are of values up to it."""
    values, order = values.sort(dim=1)
    cumulative = counts.gather(1, order).double().cumsum(dim=1)
    position = torch.searchsorted(cumulative, fraction * cumulative[:, -1:])
    return values.gather(1, position.clamp(max=values.shape[1] - 1)).squeeze(1)
