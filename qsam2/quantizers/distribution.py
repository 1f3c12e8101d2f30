"""What was seen of a tensor, a channel: the values a range is chosen from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsam2.quantizers.layout import to_rows


def row_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Min and max (C,) of rows (C, n). On CPUs PyTorch's `aminmax` of a dimension takes 30 times as long."""
    return rows.amin(dim=1), rows.amax(dim=1)


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
        minimum, maximum = row_extremes(rows)
        return cls(
            values=rows,
            counts=torch.ones_like(rows[:1]).expand_as(rows),
            minimum=minimum,
            maximum=maximum,
            mean=rows.mean(dim=1),
            std=at_most_half_the_range(rows.std(dim=1, correction=0), minimum, maximum),
            mean_abs=rows.abs().mean(dim=1),
        )
