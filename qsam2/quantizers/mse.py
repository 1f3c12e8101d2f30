"""Range by error: the clip ratio, 1/100 ... 1, of least mean |Q(x) - x|^2.4.

The error, its power and the hundred ratios are those of common post-training practice (BRECQ's and QDrop's code).
Ours: for large symmetric weights every fourth ratio is tried first, then those around the best. An affine grid's error
jumps where its zero point is rounded to another code, a small tensor's with each value: they try all hundred, which
costs little there (affine grids are those of activations, of which a histogram was kept).
Ours, too: of few bits, the two bounds of an affine grid are then moved one by one. One ratio for both keeps a code for
the small negative end of what comes out of a GELU, however coarse the steps are (docs/experiments.md has the decibels).
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
"""At most; in each both bounds are moved once."""


def best_clip_ratio(seen: Distribution, grid: Grid, bounds: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The ratio (C,) whose `bounds(ratio)` have the least error, the largest among equals."""
    all_ratios = not grid.symmetric or seen.values.numel() < SMALL_TENSOR
    return _best_ratio(lambda ratio: clipping_error(seen, grid, *bounds(ratio)), seen.minimum, all_ratios=all_ratios)[0]


def best_bounds(seen: Distribution, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower <= 0 <= upper bound (C,) of least error: hundredths of minimum and maximum.

    The same of both, and from there, on an affine grid of few bits, each by itself in turn until none moves.
    """
    extremes = seen.minimum.clamp(max=0.0), seen.maximum.clamp(min=0.0)
    ratio = best_clip_ratio(seen, grid, lambda ratio: (extremes[0] * ratio, extremes[1] * ratio))
    lower, upper = (extreme * ratio for extreme in extremes)
    if grid.symmetric or grid.bits > FEW_BITS:
        return lower, upper
    least = clipping_error(seen, grid, lower, upper)
    for _ in range(ROUNDS):
        before = least
        lower, least = _moved(extremes[0], lower, least, partial(clipping_error, seen, grid, upper=upper))
        upper, least = _moved(extremes[1], upper, least, partial(clipping_error, seen, grid, lower))
        if torch.equal(least, before):
            break
    return lower, upper


def _moved(extreme: Tensor, bound: Tensor, least: Tensor, error: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`bound` (C,) or the part of `extreme` whose `error` is less than `least`, and that error."""
    ratio, found = _best_ratio(lambda ratio: error(extreme * ratio), extreme)
    return torch.where(found < least, extreme * ratio, bound), torch.minimum(found, least)


def _best_ratio(error: Callable[[Tensor], Tensor], like: Tensor, *, all_ratios: bool = False) -> tuple[Tensor, Tensor]:
    """The ratio (C,) of least `error(ratio)` and that error, of all hundred or of those near the best fourth one."""
    stride = 1 if all_ratios else COARSE_STRIDE
    best = torch.full_like(like, CLIP_RATIOS)
    least = torch.full_like(best, float("inf"))

    def compare(step: Tensor) -> None:
        nonlocal best, least
        found = error(step / CLIP_RATIOS)
        better = found < least
        best, least = torch.where(better, step, best), torch.where(better, found, least)

    for step in range(CLIP_RATIOS, 0, -stride):
        compare(torch.full_like(best, step))
    while stride > 1:
        stride //= 2
        center = best
        for neighbour in (center + stride, center - stride):
            compare(neighbour.clamp(1, CLIP_RATIOS))
    return best / CLIP_RATIOS, least


def least_error_grid(seen: Distribution, grid: Grid) -> Grid:
    """The mid-tread or the mid-rise form of an affine grid, whichever has less error (of all channels) at its best."""
    forms = [replace(grid, mid_rise=mid_rise) for mid_rise in (False, True)]
    errors = [float(clipping_error(seen, form, *best_bounds(seen, form)).sum()) for form in forms]
    return forms[errors[1] < errors[0]]


def clipping_error(seen: Distribution, grid: Grid, lower: Tensor, upper: Tensor) -> Tensor:
    """Sum (C,) of |Q(x) - x|^2.4 over what was seen, for bounds (C,)."""
    scale, zero_point = (row[:, None] for row in grid.from_bounds(lower, upper))
    levels = to_levels(seen.values, scale, grid.qmin - zero_point, grid.qmax - zero_point, grid.mid_rise)
    error = levels.mul_(scale).sub_(seen.values).abs_()
    error = error.log2_().mul_(ERROR_POWER).exp2_()  # several times as fast as a power
    return error.mul_(seen.counts).sum(dim=1)
