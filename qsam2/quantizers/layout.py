"""Views of a tensor as kernels and statistics read it: without a copy wherever its memory allows that."""

from __future__ import annotations

from torch import Tensor


def dense_order(x: Tensor) -> list[int] | None:
    """The dimensions in the order in which a permuted, gapless x lies in memory; None for any other x."""
    if x.is_contiguous():
        return None
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return order if x.permute(order).is_contiguous() else None


def permuted(x: Tensor, order: list[int] | None) -> Tensor:
    """x with its dimensions in that order."""
    return x if order is None else x.permute(order)


def permuted_back(x: Tensor, order: list[int] | None) -> Tensor:
    """Undoes `permuted`."""
    return x if order is None else x.permute([order.index(dim) for dim in range(len(order))])


def to_rows(x: Tensor, channel_dim: int | None) -> Tensor:
    """(C, n), a row a channel of dimension `channel_dim`; (1, n) for None, in any order. A view where possible."""
    if channel_dim is None:
        return permuted(x, dense_order(x)).reshape(1, -1)
    return x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)
