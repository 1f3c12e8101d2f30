"""What was seen of a tensor, a channel: the values a range is chosen from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def to_rows(x: Tensor, channel_dim: int | None) -> Tensor:
    """(C, n) with one row a channel of dimension `channel_dim`, or (1, n) for None. A view where possible."""
    return x.reshape(1, -1) if channel_dim is None else x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)


def at_most_half_the_range(std: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """A standard deviation is never larger; one that overflowed becomes finite."""
    return torch.minimum(std, (maximum - minimum) / 2)


@dataclass(frozen=True)
class Distribution:
    """Values and their counts, (C, n) float32 each, with the exact statistics (C,) a channel."""

    values: Tensor
    counts: Tensor
    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    std: Tensor
    mean_abs: Tensor

    @classmethod
    def of(cls, x: Tensor, channel_dim: int | None) -> Distribution:
        """All values of one finite tensor, each counted once."""
        rows = to_rows(x, channel_dim).float()
        minimum, maximum = rows.aminmax(dim=1)
        return cls(
            values=rows,
            counts=torch.ones_like(rows[:1]).expand_as(rows),
            minimum=minimum,
            maximum=maximum,
            mean=rows.mean(dim=1),
            std=at_most_half_the_range(rows.std(dim=1, correction=0), minimum, maximum),
            mean_abs=rows.abs().mean(dim=1),
        )
