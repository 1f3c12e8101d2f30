"""Statistics of a batch, one value a channel; over ranks they equal those of the joint batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsam2.quantizers.distributed import all_reduce_max, all_reduce_sum
from qsam2.quantizers.distribution import to_rows


def extremes(x: Tensor, channel_dim: int | None, *, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Min and max (C,) float32 of a batch; infinite where no rank had data."""
    rows = to_rows(x, channel_dim)
    if rows.numel() > 0:
        minimum, maximum = (bound.float() for bound in rows.aminmax(dim=1))
    else:
        maximum = torch.full((rows.shape[0],), -math.inf, device=x.device)
        minimum = -maximum
    if over_ranks:
        negated, maximum = all_reduce_max(torch.stack([-minimum, maximum]))
        minimum = -negated
    return minimum, maximum


def moments(x: Tensor, channel_dim: int | None, *, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of a batch, by counts and sums; NaN where no rank had data."""
    rows = to_rows(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = rows.sum(dim=1, dtype=dtype)
    square = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
    sums = torch.stack([torch.full_like(total, rows.shape[1]), total, square])
    if over_ranks:
        sums = all_reduce_sum(sums)
    mean, mean_square = sums[1:] / sums[0]
    return mean, (mean_square - mean.square()).clamp(min=0.0).sqrt()


def magnitudes(x: Tensor, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    """Mean magnitude and root mean square (C,) of a weight."""
    rows = to_rows(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total, root = (torch.linalg.vector_norm(rows, order, dim=1, dtype=dtype) for order in (1, 2))
    return total / rows.shape[1], root / math.sqrt(rows.shape[1])


def follow(running: Tensor, batch: Tensor, momentum: float) -> None:
    """running <- momentum * running + (1 - momentum) * batch, in place.

    A batch that is empty or overflowed (as under a gradient scaler's search) leaves it as it is.
    """
    batch = batch.to(running.dtype)
    running.copy_(torch.where(batch.isfinite(), torch.lerp(batch, running, momentum), running))


def follow_moments(mean: Tensor, std: Tensor, batch: tuple[Tensor, Tensor], momentum: float) -> None:
    """`follow` for mean and standard deviation (C,) of all that is followed, in place.

    The deviation is that of the values of all batches together: the batches' own deviations and how far their means lie
    apart (law of total variance). Averaged by itself it would miss the latter, and shrink below the one that
    calibration found on all batches at once wherever one batch differs from the next.
    """
    batch_mean, batch_std = (each.to(mean.dtype) for each in batch)
    apart = momentum * (1 - momentum) * (batch_mean - mean).square()
    variance = torch.lerp(batch_std.square(), std.square(), momentum) + apart
    follow(mean, batch_mean, momentum)
    follow(std, variance.sqrt(), momentum=0.0)
