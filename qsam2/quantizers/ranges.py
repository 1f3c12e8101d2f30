"""First range of a quantizer, from the distribution that calibration observed: minmax, percentile, mse or entropy.

mse: the clip ratio, 1/100 ... 1, of least mean |Q(x) - x|^2.4. The error, its power and the hundred ratios are common
in post-training quantization (code of BRECQ and QDrop).
Ours: for large symmetric weights every fourth ratio is tried first, then the neighbours of the best. All hundred are
tried on affine grids, whose error jumps when the zero point is rounded to another code, and on small tensors, whose
error jumps with single values; both are cheap (affine grids are those of activations, which come as a histogram).
Ours: with few bits the two bounds of an affine grid are then optimized in turn. A common ratio would keep a code for
the small negative end of a GELU's output however coarse the steps are (docs/experiments.md has the decibels).

entropy: the clip ratio of least Kullback-Leibler divergence between a histogram and its requantized self, TensorRT's
calibration (Migacz, "8-bit inference with TensorRT", GTC 2017). For a clipped part of the histogram, P is that part
with the clipped counts added to its outermost bins; Q is the part without them, its bins merged into as many cells as
there are levels and the counts of each cell spread over its bins that are filled in P; minimise sum P log(P/Q), both
normalized. The bin of zero takes its neighbour's count, as in NVIDIA's pytorch-quantization, since zero has a level of
its own.
Ours: the ratios 1/100 ... 1 instead of every bin; bins are 2^e/2048 wide, 2^e the power of two above the largest
magnitude, so that histograms merge exactly; an affine range scales both ends, over bins of both signs; each ratio reads
prefix sums at the edges of the cells; no ratio clips more than a hundredth of the counts: if most values are equal, as
in the background of a mask, clipping them into the outermost bin would have no divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qsam2.quantizers.grid import Grid
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.passes import to_levels
from qsam2.recipe.quantizer_specs import FEW_BITS, RangedSpec

CLIP_RATIOS = 100
ERROR_POWER = 2.4
COARSE_STRIDE = 4
SMALL_TENSOR = 2**17
ROUNDS = 3
"""Maximum number of rounds; each optimizes both bounds once."""
BINS = 2048  # of the entropy's histogram, per side
MOST_CLIPPED = 0.01  # of the values, by entropy


def initial_bounds(observed: Distribution, spec: RangedSpec, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) by `spec.range`: minmax, percentile, mse or entropy."""
    if spec.range == "percentile":
        return percentile_bounds(observed, spec.percentile, grid.symmetric)
    if spec.range == "mse":
        return best_bounds(observed, grid)
    lower, upper = _extremes(observed)
    if spec.range == "minmax":
        return lower, upper
    assert spec.range == "entropy"
    ratio = least_divergence_ratio(observed, grid)
    return lower * ratio, upper * ratio


def _extremes(observed: Distribution) -> tuple[Tensor, Tensor]:
    """Bounds (C,) of all values and zero."""
    return observed.minimum.clamp(max=0.0), observed.maximum.clamp(min=0.0)


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


# Least error


def best_bounds(observed: Distribution, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) of least error: hundredths of minimum and maximum.

    The ratio is common to both; on an affine grid of few bits each bound is then optimized in turn until none changes.
    """
    extremes = _extremes(observed)
    ratio, least = best_clip_ratio(observed, grid)
    bounds = [extreme * ratio for extreme in extremes]
    if grid.symmetric or grid.bits > FEW_BITS:
        return bounds[0], bounds[1]

    def error_of_end(end: int, ratio: Tensor) -> Tensor:
        return clipping_error(observed, grid, *(extremes[i] * ratio if i == end else bounds[i] for i in (0, 1)))

    for _ in range(ROUNDS):
        before = least
        for end in (0, 1):
            ratio, error = _best_ratio(partial(error_of_end, end), least)
            bounds[end] = torch.where(error < least, extremes[end] * ratio, bounds[end])
            least = torch.minimum(error, least)
        if torch.equal(least, before):
            break
    return bounds[0], bounds[1]


def best_clip_ratio(observed: Distribution, grid: Grid) -> tuple[Tensor, Tensor]:
    """Ratio (C,) of minimum and maximum that has the least error, the largest among equals, and its error."""
    lower, upper = _extremes(observed)
    all_ratios = not grid.symmetric or observed.values.numel() < SMALL_TENSOR
    return _best_ratio(
        lambda ratio: clipping_error(observed, grid, lower * ratio, upper * ratio), lower, all_ratios=all_ratios
    )


def _best_ratio(error: Callable[[Tensor], Tensor], like: Tensor, *, all_ratios: bool = False) -> tuple[Tensor, Tensor]:
    """Ratio (C,) of least `error(ratio)` and its error; by default only ratios near the best fourth one are tried."""
    stride = 1 if all_ratios else COARSE_STRIDE
    best = torch.full_like(like, CLIP_RATIOS)
    least = torch.full_like(best, float("inf"))

    def compare(step: Tensor) -> None:
        nonlocal best, least
        candidate = error(step / CLIP_RATIOS)
        better = candidate < least
        best, least = torch.where(better, step, best), torch.where(better, candidate, least)

    for step in range(CLIP_RATIOS, 0, -stride):
        compare(torch.full_like(best, step))
    while stride > 1:
        stride //= 2
        center = best
        for neighbour in (center + stride, center - stride):
            compare(neighbour.clamp(1, CLIP_RATIOS))
    return best / CLIP_RATIOS, least


def least_error_grid(observed: Distribution, grid: Grid) -> Grid:
    """Mid-tread or mid-rise form of an affine grid, the one of less total error with its best bounds."""
    forms = [replace(grid, mid_rise=mid_rise) for mid_rise in (False, True)]
    errors = [float(clipping_error(observed, form, *best_bounds(observed, form)).sum()) for form in forms]
    return forms[errors[1] < errors[0]]


def clipping_error(observed: Distribution, grid: Grid, lower: Tensor, upper: Tensor) -> Tensor:
    """Sum (C,) of |Q(x) - x|^2.4 over the observed values, for bounds (C,)."""
    scale, zero_point = (row[:, None] for row in grid.from_bounds(lower, upper))
    levels = to_levels(observed.values, scale, grid.qmin - zero_point, grid.qmax - zero_point, grid.mid_rise)
    error = levels.mul_(scale).sub_(observed.values).abs_()
    error = error.log2_().mul_(ERROR_POWER).exp2_()  # several times as fast as pow
    return error.mul_(observed.counts).sum(dim=1)


# Least divergence


def least_divergence_ratio(observed: Distribution, grid: Grid) -> Tensor:
    """Ratio (C,) of minimum and maximum, 1/100 ... 1, that has the least divergence, the largest among equals.

    Symmetric grids use magnitudes. Skipped are parts of fewer bins than cells, and parts that clip more than
    `MOST_CLIPPED` of the counts.
    """
    histogram, width, zero = _histogram(observed, grid.symmetric)
    filled = (histogram > 0).double()
    # sums (C, bins + 1) of the bins before each edge: counts, count log count, filled bins
    sums = [
        F.pad(part.cumsum(dim=1), (1, 0)) for part in (histogram, torch.special.xlogy(histogram, histogram), filled)
    ]
    cells = 2 ** (grid.bits - 1) if grid.symmetric else 2**grid.bits
    least = torch.full_like(width, float("inf"))
    best = torch.ones_like(observed.minimum)
    for step in range(CLIP_RATIOS, 0, -1):
        ratio = step / CLIP_RATIOS
        lower, upper = ((extreme * ratio).double() / width for extreme in _extremes(observed))
        start = torch.zeros_like(zero) if grid.symmetric else zero + lower.floor().long()
        end = zero + (torch.maximum(-lower, upper) if grid.symmetric else upper).ceil().long()
        start, end = start.clamp(0, histogram.shape[1] - 1), end.clamp(1, histogram.shape[1])
        divergence = _divergence(histogram, sums, start, end, cells)
        better = divergence < least
        least = torch.where(better, divergence, least)
        best = torch.where(better, ratio, best)
    return best


def _histogram(observed: Distribution, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (C, bins) float64, the width (C,) of a bin, and the index (C,) of the bin that begins at zero."""
    largest = torch.maximum(-observed.minimum, observed.maximum).double()
    width = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent) / BINS
    first = 0 if symmetric else BINS
    values = observed.values.abs() if symmetric else observed.values
    index = (values.double() / width[:, None]).floor_().long().add_(first).clamp_(0, first + BINS - 1)
    histogram = torch.zeros(len(width), first + BINS, dtype=torch.float64, device=width.device)
    histogram.scatter_add_(1, index, observed.counts.double())
    histogram[:, first] = histogram[:, first + 1]
    return histogram, width, torch.full_like(index[:, 0], first)


def _divergence(histogram: Tensor, sums: list[Tensor], start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Divergence (C,) for the bins from `start` to before `end` (C,); infinite for too few bins or counts."""
    edge = torch.arange(cells + 1, device=start.device)
    edges = start[:, None] + torch.div(edge * (end - start)[:, None] + cells - 1, cells, rounding_mode="floor")
    mass, x_log_x, filled = (part.gather(1, edges) for part in sums)
    kept = mass[:, -1] - mass[:, 0]
    total = sums[0][:, -1]
    masses, filled = mass.diff(dim=1), filled.diff(dim=1)
    own = x_log_x[:, -1] - x_log_x[:, 0]  # sum of P log P
    cross = torch.zeros_like(own)  # sum of P log Q
    outermost = ((0, start, mass[:, 0]), (-1, end - 1, total - mass[:, -1]))
    for cell, bin_index, clipped in outermost:
        count = histogram.gather(1, bin_index[:, None]).squeeze(1)
        filled[:, cell] += (count == 0) & (clipped > 0)
        with_clipped = count + clipped
        own = own + torch.special.xlogy(with_clipped, with_clipped) - torch.special.xlogy(count, count)
        cross = cross + torch.special.xlogy(clipped, masses[:, cell] / filled[:, cell].clamp(min=1))
    cross = cross + torch.special.xlogy(masses, masses / filled.clamp(min=1)).sum(dim=1)
    divergence = (own - cross) / total + (kept / total).log()
    return torch.where((end - start >= cells) & (kept >= (1 - MOST_CLIPPED) * total), divergence, float("inf"))
