"""Views of a tensor as kernels and statistics read it: without a copy wherever its memory allows that."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

SHORTEST_ROW = 32
"""Elements; where rows that lie apart are shorter, a copy is read faster."""


@dataclass(frozen=True)
class Layout:
    """How a tensor becomes the (outer, C, inner) of the kernels, C the channels with a range of their own, and back.

    With one range in all the order of the elements does not matter: a permuted tensor is taken as it lies in memory,
    one whose rows lie apart (a slice of a product) as (rows, 1, row).
    """

    shape: tuple[int, ...]
    """As it lies in memory."""
    order: list[int] | None
    """The dimensions in that order; None for the tensor's own."""
    view: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor, num_channels: int, channel_dim: int) -> Self:
        """That of x, with one range in all or `num_channels` along a dimension."""
        shape = tuple(x.shape)
        if num_channels > 1:
            dim = channel_dim % x.ndim
            return cls(shape, None, (math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])))
        if x.is_contiguous():
            return cls(shape, None, (1, 1, x.numel()))
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        lying = x.permute(order)
        row = _row(lying)
        return cls(tuple(lying.shape), order, (x.numel() // max(row, 1), 1, row))

    def flat(self, x: Tensor) -> Tensor:
        """x in the view, of which autograd does not know: a compiled kernel is compiled again for each base."""
        lying = x if self.order is None else x.permute(self.order)
        return lying.reshape(self.view).data

    def back(self, flat: Tensor) -> Tensor:
        """Undoes `flat`, for a tensor without gaps."""
        lying = flat.view(self.shape)
        return lying if self.order is None else lying.permute([self.order.index(dim) for dim in range(len(self.order))])


def to_rows(x: Tensor, channel_dim: int | None) -> Tensor:
    """(C, n), a row a channel of dimension `channel_dim`; (1, n) for None, in any order. A view where possible."""
    if channel_dim is None:
        return Layout.of(x, 1, 0).flat(x).reshape(1, -1)
    return x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)


def _row(lying: Tensor) -> int:
    """Elements that lie together in a tensor of falling strides: all of them, or those of rows at equal distances.

    All, too, where rows are short or lie otherwise: `Layout.flat` copies those.
    """
    row, distance = 1, None
    for size, stride in zip(reversed(lying.shape), reversed(lying.stride()), strict=True):
        if size == 1:
            continue
        if distance is None and stride == row:
            row *= size
        elif stride > 0 and distance in (None, stride):
            distance = stride * size
        else:
            return lying.numel()
    return row if row >= SHORTEST_ROW else lying.numel()
