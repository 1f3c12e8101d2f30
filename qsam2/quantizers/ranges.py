"""The first range of a quantizer: from what calibration saw to lower and upper bounds."""

from __future__ import annotations

from torch import Tensor

from qsam2.quantizers.distribution import Distribution
from qsam2.quantizers.entropy import least_divergence_ratio
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.mse import best_bounds
from qsam2.quantizers.percentile import percentile_bounds
from qsam2.recipe.quantizers import RangedSpec


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
