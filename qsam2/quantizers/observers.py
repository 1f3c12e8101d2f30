"""Observers: what calibration remembers of the tensors that pass, in one pass and bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsam2.quantizers.distributed import all_reduce_max, all_reduce_sum
from qsam2.quantizers.distribution import Distribution, at_most_half_the_range, row_extremes
from qsam2.quantizers.layout import to_rows

BINS_PER_SIDE = 4096
MAX_SAMPLES = 2**20  # values of one tensor that enter the histogram; min, max and sums use all of them
ZERO_EXPONENT = -100  # histogram reach of a channel that was zero so far


class Observer:
    """Exact min, max, mean, std, mean|x| and a histogram a channel (`channel_dim`, or one for the tensor if None).

    The histogram reaches from -2^e to 2^e with 4096 bins a side; a larger value raises e, which merges bins exactly, so
    that the result does not depend on the order of batches. Larger tensors enter it by an evenly strided subsample.
    Kept on the CPU: calibration does not hold device memory.
    """

    def __init__(self, num_channels: int, channel_dim: int | None) -> None:
        self.channel_dim = channel_dim
        self.minimum = torch.full((num_channels,), math.inf)
        self.maximum = torch.full((num_channels,), -math.inf)
        self.sums = torch.zeros(4, num_channels, dtype=torch.float64)  # count, x, x^2, |x|
        self.exponent = torch.full((num_channels,), ZERO_EXPONENT)
        self.counts = torch.zeros(num_channels, 2 * BINS_PER_SIDE)

    @torch.no_grad()
    def update(self, x: Tensor) -> bool:
        """Records x; False, and nothing recorded, if it holds NaN or infinity. An empty tensor changes nothing."""
        if x.numel() == 0:
            return True
        rows = to_rows(x, self.channel_dim).float()
        minimum, maximum = (bound.cpu() for bound in row_extremes(rows))
        if not (minimum.isfinite().all() and maximum.isfinite().all()):
            return False
        self.minimum = torch.minimum(self.minimum, minimum)
        self.maximum = torch.maximum(self.maximum, maximum)
        # A norm of order 1 takes four times as long as this sum.
        sums = [rows.sum(dim=1), torch.linalg.vector_norm(rows, dim=1), rows.abs().sum(dim=1)]
        total, root, absolute = (each.cpu().double() for each in sums)
        count = torch.full_like(total, rows.shape[1])
        self.sums = self.sums + torch.stack([count, total, root.square(), absolute])
        self._raise_reach(torch.maximum(-minimum, maximum))
        self.counts = self.counts + _histogram(_subsample(rows), self.exponent).cpu()
        return True

    def distribution(self, device: torch.device) -> Distribution | None:
        """What all ranks saw, on `device`; None if a channel saw nothing. Every rank must call it."""
        extremes = all_reduce_max(torch.stack([-self.minimum, self.maximum]).to(device))
        sums = all_reduce_sum(self.sums.to(device))
        self._raise_reach(torch.maximum(*extremes.cpu()))
        counts = all_reduce_sum(self.counts.to(device))
        if (sums[0] == 0).any():
            return None
        mean, square, absolute = sums[1:] / sums[0]
        minimum, maximum = -extremes[0], extremes[1]
        centers = torch.arange(-BINS_PER_SIDE, BINS_PER_SIDE, device=device) + 0.5
        width = torch.ldexp(torch.ones_like(minimum), self.exponent.to(device)) / BINS_PER_SIDE
        return Distribution(
            values=(centers * width[:, None]).clamp(minimum[:, None], maximum[:, None]),
            counts=counts,
            minimum=minimum,
            maximum=maximum,
            mean=mean.float(),
            std=at_most_half_the_range((square - mean.square()).clamp(min=0).sqrt().float(), minimum, maximum),
            mean_abs=absolute.float(),
        )

    def _raise_reach(self, largest: Tensor) -> None:
        """Merges bins until every channel reaches `largest` (C,)."""
        exponent = torch.where(largest > 0, torch.frexp(largest)[1], ZERO_EXPONENT)
        raised = torch.maximum(self.exponent, exponent)
        if torch.equal(raised, self.exponent):
            return
        shift = torch.ldexp(torch.ones_like(largest), (self.exponent - raised).clamp(min=-60))[:, None]
        bins = torch.arange(-BINS_PER_SIDE, BINS_PER_SIDE)
        merged = (bins * shift).floor().long() + BINS_PER_SIDE
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, merged, self.counts)
        self.exponent = raised


def _histogram(rows: Tensor, exponent: Tensor) -> Tensor:
    """Counts (C, bins) of rows (C, n) which lie within +-2^exponent."""
    channels, bins = rows.shape[0], 2 * BINS_PER_SIDE
    per_unit = torch.ldexp(torch.full((channels, 1), float(BINS_PER_SIDE)), -exponent[:, None]).to(rows.device)
    index = (rows * per_unit).floor_().add_(BINS_PER_SIDE).clamp_(0, bins - 1).long()
    index += torch.arange(channels, device=rows.device)[:, None] * bins
    return torch.bincount(index.flatten(), minlength=channels * bins).view(channels, bins).float()


def _subsample(rows: Tensor) -> Tensor:
    """At most MAX_SAMPLES values; the stride shares no factor with the row, so that no inner dimension is favoured."""
    stride = math.ceil(rows.numel() / MAX_SAMPLES)
    while math.gcd(stride, rows.shape[1]) > 1:
        stride += 1
    return rows[:, ::stride]
