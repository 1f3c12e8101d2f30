"""Observers and running statistics of a tensor: one pass, bounded memory, equal on all ranks.

An `Observer` sees all calibration batches of a tensor and returns their `Distribution`, from which a method takes its
first range. In training, `extremes`, `sums` and `magnitudes` measure one batch, and `update_running` and
`update_moments` keep exponential moving averages of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsam2.quantizers.passes import to_rows

BINS_PER_SIDE = 4096
MAX_SAMPLES = 2**20  # values of one tensor that enter the histogram; min, max and sums use all of them
ZERO_EXPONENT = -100  # exponent of the histogram's reach for an all-zero channel


@dataclass(frozen=True)
class Distribution:
    """Values and their counts, (C, n) float32 each, with exact statistics (C,) per channel."""

    values: Tensor
    counts: Tensor
    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    std: Tensor
    mean_abs: Tensor

    @classmethod
    def of(cls, x: Tensor, channel_dim: int | None) -> Distribution:
        """Distribution of one finite tensor, each value with count 1."""
        rows = to_rows(x, channel_dim).float()
        minimum, maximum = row_extremes(rows)
        exact = rows.double()  # sums of values near float32's largest would be infinite
        return cls(
            values=rows,
            counts=torch.ones_like(rows[:1]).expand_as(rows),
            minimum=minimum,
            maximum=maximum,
            mean=exact.mean(dim=1).float(),
            std=exact.std(dim=1, correction=0).float(),
            mean_abs=exact.abs().mean(dim=1).float(),
        )


class Observer:
    """Exact min, max, mean, std, mean|x| and a histogram per channel (`channel_dim`; None: one for the tensor).

    The histogram covers -2^e to 2^e with 4096 bins per side; a larger value raises e, which merges bins exactly, so
    that the result does not depend on the order of batches. Larger tensors enter it as an evenly strided subsample. It
    is kept on the CPU, so that calibration holds no device memory.
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
        """Record x; False, and nothing recorded, if it holds NaN or infinity. An empty tensor changes nothing."""
        if x.numel() == 0:
            return True
        rows = to_rows(x, self.channel_dim).float()
        minimum, maximum = (bound.cpu() for bound in row_extremes(rows))
        if not (minimum.isfinite().all() and maximum.isfinite().all()):
            return False
        self.minimum = torch.minimum(self.minimum, minimum)
        self.maximum = torch.maximum(self.maximum, maximum)
        # abs().sum() takes a quarter of the time of a norm of order 1
        double: dict[str, Any] = {"dim": 1, "dtype": torch.float64}
        sums = [rows.sum(**double), torch.linalg.vector_norm(rows, **double), rows.abs().sum(**double)]
        total, root, absolute = (value.cpu().double() for value in sums)
        count = torch.full_like(total, rows.shape[1])
        self.sums = self.sums + torch.stack([count, total, root.square(), absolute])
        self._raise_reach(torch.maximum(-minimum, maximum))
        self.counts = self.counts + _histogram(_subsample(rows), self.exponent).cpu()
        return True

    def distribution(self, device: torch.device) -> Distribution | None:
        """Distribution over all ranks, on `device`; None if a channel has no values. Every rank must call it."""
        extremes = all_reduce(torch.stack([-self.minimum, self.maximum]).to(device), maximum=True)
        sums = all_reduce(self.sums.to(device))
        self._raise_reach(torch.maximum(*extremes.cpu()))
        counts = all_reduce(self.counts.to(device))
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
        """Merge bins until every channel's histogram reaches `largest` (C,)."""
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
    """Counts (C, bins) of rows (C, n) whose values lie within +-2^exponent."""
    channels, bins = rows.shape[0], 2 * BINS_PER_SIDE
    per_unit = torch.ldexp(torch.full((channels, 1), float(BINS_PER_SIDE)), -exponent[:, None]).to(rows.device)
    index = (rows * per_unit).floor_().add_(BINS_PER_SIDE).clamp_(0, bins - 1).long()
    index += torch.arange(channels, device=rows.device)[:, None] * bins
    return torch.bincount(index.flatten(), minlength=channels * bins).view(channels, bins).float()


def _subsample(rows: Tensor) -> Tensor:
    """At most MAX_SAMPLES values; the stride is coprime to the row length, so that it samples all inner dimensions."""
    stride = math.ceil(rows.numel() / MAX_SAMPLES)
    while math.gcd(stride, rows.shape[1]) > 1:
        stride += 1
    return rows[:, ::stride]


def extremes(x: Tensor, channel_dim: int | None, *, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Min and max (C,) float32 of a batch; infinite if no rank had data."""
    rows = to_rows(x, channel_dim)
    if rows.numel() > 0:
        minimum, maximum = (bound.float() for bound in row_extremes(rows))
    else:
        maximum = torch.full((rows.shape[0],), -math.inf, device=x.device)
        minimum = -maximum
    if over_ranks:
        negated, maximum = all_reduce(torch.stack([-minimum, maximum]), maximum=True)
        minimum = -negated
    return minimum, maximum


def sums(x: Tensor, channel_dim: int | None) -> tuple[Tensor, int]:
    """Sums of x and x^2 (2, C) of a batch, and the number of elements in each sum."""
    rows = to_rows(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square_()
    return torch.stack([rows.sum(dim=1, dtype=dtype), square]), rows.shape[1]


def moments(sums: Tensor, count: int, *, over_ranks: bool) -> Tensor:
    """Mean and mean square (2, C) of a batch, from the result of `sums`; NaN if no rank had data."""
    if not over_ranks:
        return sums / count
    counts = torch.full_like(sums[:1], count)
    sums = all_reduce(torch.cat([sums, counts]))
    return sums[:2] / sums[2]


def magnitudes(x: Tensor, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    """Mean magnitude and root mean square (C,) of a weight."""
    rows = to_rows(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = rows.abs().sum(dim=1, dtype=dtype)  # a quarter of the time of a norm of order 1
    root = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return total / rows.shape[1], root / math.sqrt(rows.shape[1])


def update_running(running: Tensor, batch: Tensor, momentum: float) -> None:
    """running <- momentum * running + (1 - momentum) * batch, in place.

    An empty batch or one with overflow (as while a gradient scaler searches its scale) changes nothing.
    """
    batch = batch.to(running.dtype)
    running.copy_(torch.where(batch.isfinite(), torch.lerp(batch, running, momentum), running))


def update_moments(mean: Tensor, std: Tensor, batch: Tensor, momentum: float) -> None:
    """`update_running` for a mean and standard deviation (C,), in place; `batch` is a result of `moments`.

    The average is taken of mean squares, so that the deviation is that of all batches together and includes the spread
    of their means (law of total variance). An average of deviations would omit that spread and fall below the deviation
    that calibration measures on all batches at once.
    """
    squares = torch.stack([mean, mean.square().addcmul_(std, std)])
    now = torch.lerp(batch.to(mean.dtype), squares, momentum)
    now[1] = now[1].addcmul_(now[0], now[0], value=-1.0).clamp_(min=0.0).sqrt_()
    for running, new in zip((mean, std), torch.where(now.isfinite(), now, torch.stack([mean, std])), strict=True):
        running.copy_(new)


def row_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Min and max (C,) of rows (C, n). On a CPU, `aminmax` along a dimension takes 30 times as long."""
    return rows.amin(dim=1), rows.amax(dim=1)


def at_most_half_the_range(std: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """Standard deviation clamped to its upper bound (max - min) / 2, which makes an overflowed one finite."""
    return torch.minimum(std, maximum / 2 - minimum / 2)


def world_size() -> int:
    """Number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x: Tensor, *, maximum: bool = False) -> Tensor:
    """Sum or maximum over ranks; x itself in a single process. Every rank must call it equally often."""
    if world_size() == 1:
        return x
    reduced = x.clone()
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return reduced
