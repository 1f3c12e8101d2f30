"""Range by entropy: the clip ratio of least Kullback-Leibler divergence between a histogram and its requantized self.

TensorRT's calibration (Migacz, "8-bit inference with TensorRT", GTC 2017). For a clipped part of the histogram, P is
that part with the clipped counts added to its outermost bins; Q is the part without them, its bins merged into as many
cells as there are levels and the counts of each cell spread over its bins that are filled in P; minimise
sum P log(P/Q), both normalized. The bin of zero takes its neighbour's count, as in NVIDIA's pytorch-quantization, since
zero has a level of its own.
Ours: the ratios 1/100 ... 1 instead of every bin; bins are 2^e/2048 wide, 2^e the power of two above the largest
magnitude, so that histograms merge exactly; an affine range scales both ends, over bins of both signs; each ratio reads
prefix sums at the edges of the cells; no ratio clips more than a hundredth of the counts: if most values are equal, as
in the background of a mask, clipping them into the outermost bin would have no divergence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qsam2.quantizers.grid import Grid
from qsam2.quantizers.observers import Distribution

BINS = 2048  # per side
CLIP_RATIOS = 100
MOST_CLIPPED = 0.01  # of the values


def least_divergence_ratio(
    observed: Distribution, grid: Grid, bounds: Callable[[float], tuple[Tensor, Tensor]]
) -> Tensor:
    """Ratio (C,) of 1/100 ... 1 whose `bounds(ratio)` have the least divergence, the largest among equals.

    Symmetric grids use magnitudes. Skipped are parts of fewer bins than cells, and parts that clip more than
    `MOST_CLIPPED` of the counts.
    """
    histogram, width, zero = _histogram(observed, grid.symmetric)
    sums = [_prefix_sums(part) for part in (histogram, _x_log_x(histogram), (histogram > 0).double())]
    cells = 2 ** (grid.bits - 1) if grid.symmetric else 2**grid.bits
    least = torch.full_like(width, float("inf"))
    best = torch.ones_like(observed.minimum)
    for step in range(CLIP_RATIOS, 0, -1):
        ratio = step / CLIP_RATIOS
        lower, upper = (bound.double() / width for bound in bounds(ratio))
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
        own = own + _x_log_x(count + clipped) - _x_log_x(count)
        cross = cross + torch.special.xlogy(clipped, masses[:, cell] / filled[:, cell].clamp(min=1))
    cross = cross + torch.special.xlogy(masses, masses / filled.clamp(min=1)).sum(dim=1)
    divergence = (own - cross) / total + (kept / total).log()
    return torch.where((end - start >= cells) & (kept >= (1 - MOST_CLIPPED) * total), divergence, float("inf"))


def _x_log_x(x: Tensor) -> Tensor:
    return torch.special.xlogy(x, x)


def _prefix_sums(x: Tensor) -> Tensor:
    """Sums (C, n + 1) of the entries before each edge."""
    return torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))
