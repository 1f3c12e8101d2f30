"""Statistics of a batch, one value a channel; over ranks they equal those of the joint batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsam2.quantizers.distributed import all_reduce_max, all_reduce_sum
from qsam2.quantizers.distribution import row_extremes
from qsam2.quantizers.layout import to_rows


def extremes(x: Tensor, channel_dim: int | None, *, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Min and max (C,) float32 of a batch; infinite where no rank had data."""
    rows = to_rows(x, channel_dim)
    if rows.numel() > 0:
        minimum, maximum = (bound.float() for bound in row_extremes(rows))
    else:
        maximum = torch.full((rows.shape[0],), -math.inf, device=x.device)
        minimum = -maximum
    if over_ranks:
        negated, maximum = all_reduce_max(torch.stack([-minimum, maximum]))
        minimum = -negated
    return minimum, maximum


def sums(x: Tensor, channel_dim: int | None) -> tuple[Tensor, int]:
    """Sums of x and of x^2 (2, C) of a batch, and how many elements each is of."""
    rows = to_rows(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square_()
    return torch.stack([rows.sum(dim=1, dtype=dtype), square]), rows.shape[1]


def moments(sums: Tensor, count: int, *, over_ranks: bool) -> Tensor:
    """Mean and mean square (2, C) of a batch, from what `sums` gives; NaN where no rank had data."""
    if not over_ranks:
        return sums / count
    counts = torch.full_like(sums[:1], count)
    sums = all_reduce_sum(torch.cat([sums, counts]))
    return sums[:2] / sums[2]


def magnitudes(x: Tensor, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    """Mean magnitude and root mean square (C,) of a weight."""
    rows = to_rows(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = rows.abs().sum(dim=1, dtype=dtype)  # a norm of order 1 takes four times as long
    root = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return total / rows.shape[1], root / math.sqrt(rows.shape[1])


def follow(running: Tensor, batch: Tensor, momentum: float) -> None:
    """running <- momentum * running + (1 - momentum) * batch, in place.

    A batch that is empty or overflowed (as under a gradient scaler's search) leaves it as it is.
    """
    batch = batch.to(running.dtype)
    running.copy_(torch.where(batch.isfinite(), torch.lerp(batch, running, momentum), running))


def follow_moments(mean: Tensor, std: Tensor, batch: Tensor, momentum: float) -> None:
    """`follow` for mean and standard deviation (C,) of all that is followed, in place; `batch` is of `moments`.

    Mean squares are followed, not deviations: so the deviation is that of the values of all batches together, their
    own and how far their means lie apart (law of total variance). Averaged by itself it would miss the latter, and
    shrink below the one that calibration found on all batches at once wherever one batch differs from the next.
    """
    squares = torch.stack([mean, mean.square().addcmul_(std, std)])
    now = torch.lerp(batch.to(mean.dtype), squares, momentum)
    now[1] = now[1].addcmul_(now[0], now[0], value=-1.0).clamp_(min=0.0).sqrt_()
    for running, new in zip((mean, std), torch.where(now.isfinite(), now, torch.stack([mean, std])), strict=True):
        running.copy_(new)
