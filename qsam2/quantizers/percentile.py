"""Range by percentiles: what lies beyond is clipped (common practice; 99.9 % and the like)."""

from __future__ import annotations

import torch
from torch import Tensor

from qsam2.quantizers.distribution import Distribution


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
