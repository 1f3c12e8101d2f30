"""Range by error: the clip ratio, 1/100 ... 1, of least mean |Q(x) - x|^2.4.

The error, its power and the hundred ratios are those of common post-training practice (BRECQ's and QDrop's code).
Ours: for large symmetric weights every fourth ratio is tried first, then those around the best. An affine grid's error
jumps where its zero point is rounded to another code, a small tensor's with each value: they try all hundred, which
costs little there (affine grids are those of activations, of which a histogram was kept).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qsam2.quantizers.distribution import Distribution
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.passes import to_levels

ERROR_POWER = 2.4
CLIP_RATIOS = 100
COARSE_STRIDE = 4
SMALL_TENSOR = 2**17


def best_clip_ratio(seen: Distribution, grid: Grid, bounds: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The ratio (C,) whose `bounds(ratio)` have the least error, the largest among equals."""
    all_ratios = not grid.symmetric or seen.values.numel() < SMALL_TENSOR
    stride = 1 if all_ratios else COARSE_STRIDE
    best = torch.full_like(seen.minimum, CLIP_RATIOS)
    least = torch.full_like(best, float("inf"))

    def compare(step: Tensor) -> None:
        nonlocal best, least
        error = clipping_error(seen, grid, *bounds(step / CLIP_RATIOS))
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)

    for step in range(CLIP_RATIOS, 0, -stride):
        compare(torch.full_like(best, step))
    while stride > 1:
        stride //= 2
        center = best
        for neighbour in (center + stride, center - stride):
            compare(neighbour.clamp(1, CLIP_RATIOS))
    return best / CLIP_RATIOS


def clipping_error(seen: Distribution, grid: Grid, lower: Tensor, upper: Tensor) -> Tensor:
    """Sum (C,) of |Q(x) - x|^2.4 over what was seen, for bounds (C,)."""
    scale, zero_point = (row[:, None] for row in grid.from_bounds(lower, upper))
    levels = to_levels(seen.values, scale, grid.qmin - zero_point, grid.qmax - zero_point, grid.mid_rise)
    error = levels.mul_(scale).sub_(seen.values).abs_()
    error = error.log2_().mul_(ERROR_POWER).exp2_()  # several times as fast as a power
    return error.mul_(seen.counts).sum(dim=1)
