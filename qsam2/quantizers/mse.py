"""Range by error: the clip ratio, 1/100 ... 1, of least mean |Q(x) - x|^2.4.

The error, its power and the hundred ratios are common in post-training quantization (code of BRECQ and QDrop).
Ours: for large symmetric weights every fourth ratio is tried first, then the neighbours of the best. All hundred are
tried on affine grids, whose error jumps when the zero point is rounded to another code, and on small tensors, whose
error jumps with single values; both are cheap (affine grids are those of activations, which come as a histogram).
Ours: with few bits the two bounds of an affine grid are then optimized in turn. A common ratio would keep a code for
the small negative end of a GELU's output however coarse the steps are (docs/experiments.md has the decibels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qsam2.quantizers.grid import Grid
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.passes import to_levels
from qsam2.recipe.quantizer_specs import FEW_BITS

ERROR_POWER = 2.4
CLIP_RATIOS = 100
COARSE_STRIDE = 4
SMALL_TENSOR = 2**17
ROUNDS = 3
"""Maximum number of rounds; each optimizes both bounds once."""


def best_clip_ratio(observed: Distribution, grid: Grid, bounds: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Ratio (C,) whose `bounds(ratio)` have the least error, the largest among equals."""
    all_ratios = not grid.symmetric or observed.values.numel() < SMALL_TENSOR
    return _best_ratio(
        lambda ratio: clipping_error(observed, grid, *bounds(ratio)), observed.minimum, all_ratios=all_ratios
    )[0]


def best_bounds(observed: Distribution, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) of least error: hundredths of minimum and maximum.

    The ratio is common to both; on an affine grid of few bits each bound is then optimized in turn until none changes.
    """
    extremes = observed.minimum.clamp(max=0.0), observed.maximum.clamp(min=0.0)
    ratio = best_clip_ratio(observed, grid, lambda ratio: (extremes[0] * ratio, extremes[1] * ratio))
    lower, upper = (extreme * ratio for extreme in extremes)
    if grid.symmetric or grid.bits > FEW_BITS:
        return lower, upper
    least = clipping_error(observed, grid, lower, upper)
    for _ in range(ROUNDS):
        before = least
        lower, least = _improved(extremes[0], lower, least, partial(clipping_error, observed, grid, upper=upper))
        upper, least = _improved(extremes[1], upper, least, partial(clipping_error, observed, grid, lower))
        if torch.equal(least, before):
            break
    return lower, upper


def _improved(
    extreme: Tensor, bound: Tensor, least: Tensor, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`bound` (C,), or the fraction of `extreme` if its `error` is below `least`; and the error."""
    ratio, lower_error = _best_ratio(lambda ratio: error(extreme * ratio), extreme)
    return torch.where(lower_error < least, extreme * ratio, bound), torch.minimum(lower_error, least)


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
