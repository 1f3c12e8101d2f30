"""Passes of the fake-quantization operation over a tensor: forward, backward and dequantization of codes.

Notation as in `fake_quant`. Tensors are (outer, C, inner), see `Layout`; values per channel are (1, C, 1). Compiled, a
pass reads and writes each tensor once. Eager on a CPU, it works on blocks that fit the cache, and uses minimum, maximum
and products of signs, since clamp and masks take 5 to 30 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

SHORTEST_ROW = 32
"""Elements; a tensor of separate rows that are shorter is copied, which reads faster."""


RESIDUAL_STEPS = 252  # level - t in [-1/2, 1/2] becomes -126..126
CLIPPED = 127  # -127 below, 127 above
BLOCK = 2**18
"""Elements per block of the eager kernels on a CPU: half a dozen float copies fit the cache. Forward and backward take
1/1.4 and 1/1.1 of the time of 2**16 on 6 and 25 MB, and half of that without blocks on 25 MB."""

Keep = Literal["residual", "mask", "nothing"]
"""Content of the byte per element that the forward pass saves."""


@dataclass(frozen=True)
class Layout:
    """View of a tensor as the kernels' (outer, C, inner), C the channels with their own range, and back.

    Per tensor the order of elements does not matter: a permuted tensor is viewed in memory order, one of separate rows
    (a slice of a product) as (rows, 1, row length).
    """

    shape: tuple[int, ...]
    """In memory order."""
    order: list[int] | None
    """Dimensions in memory order; None if that is the tensor's own order."""
    view: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor, num_channels: int, channel_dim: int) -> Self:
        """Layout of x, with one range per tensor or `num_channels` along a dimension."""
        shape = tuple(x.shape)
        if num_channels > 1:
            dim = channel_dim % x.ndim
            return cls(shape, None, (math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])))
        if x.is_contiguous():
            return cls(shape, None, (1, 1, x.numel()))
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        ordered = x.permute(order)
        row = _row_length(ordered)
        return cls(tuple(ordered.shape), order, (x.numel() // max(row, 1), 1, row))

    def flat(self, x: Tensor) -> Tensor:
        """View of x, hidden from autograd: a compiled kernel would be recompiled for each base of a view."""
        ordered = x if self.order is None else x.permute(self.order)
        return ordered.reshape(self.view).data

    def back(self, flat: Tensor) -> Tensor:
        """Inverse of `flat`, for a contiguous tensor."""
        ordered = flat.view(self.shape)
        return ordered if self.order is None else ordered.permute([self.order.index(i) for i in range(ordered.ndim)])


def to_rows(x: Tensor, channel_dim: int | None) -> Tensor:
    """Rows (C, n), one per channel of `channel_dim`; (1, n) in any order if that is None. A view where possible."""
    if channel_dim is None:
        return Layout.of(x, 1, 0).flat(x).reshape(1, -1)
    return x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)


def _row_length(ordered: Tensor) -> int:
    """Length of contiguous rows at equal distances in a tensor of falling strides.

    All elements if the tensor is contiguous, and if its rows are short or irregular: `Layout.flat` copies those.
    """
    row, distance = 1, None
    for size, stride in zip(reversed(ordered.shape), reversed(ordered.stride()), strict=True):
        if size == 1:
            continue
        if distance is None and stride == row:
            row *= size
        elif stride > 0 and distance in (None, stride):
            distance = stride * size
        else:
            return ordered.numel()
    return row if row >= SHORTEST_ROW else ordered.numel()


def to_levels(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> Tensor:
    """Grid values in steps, in the dtype that x and scale promote to; `scale`, `low`, `high` broadcast to x."""
    return _clip_(_round_(x / scale, mid_rise), low, high)


def _round_(t: Tensor, mid_rise: bool) -> Tensor:
    return t.sub_(0.5).round_().add_(0.5) if mid_rise else t.round_()


def _clip_(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(t, high, out=t), low, out=t)


def _clip_to_edges(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> Tensor:
    """Copy of t, clipped to the edges of "inside"."""
    if mid_rise:
        low, high = low - 0.5, high + 0.5
    return torch.maximum(torch.minimum(t, high), low)


def _split_(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels; level - t inside; side: -1 below, 0 inside, 1 above. Overwrites t."""
    clipped = _clip_to_edges(t, low, high, mid_rise)
    side = t.sub_(clipped).sign_()
    levels = _round_(clipped.clone(), mid_rise)
    if mid_rise:  # otherwise low and high are levels, and rounding between them stays between them
        _clip_(levels, low, high)
    return levels, torch.sub(levels, clipped, out=clipped), side


class Quantized(NamedTuple):
    """Result of `quantize_pass`; None for parts that were not requested."""

    out: Tensor
    """In x's shape and dtype."""
    byte: Tensor | None
    """Saved for the backward pass, int8."""
    codes: Tensor | None
    """level - low, uint8."""
    total: Tensor | None
    square: Tensor | None
    """Sums of x and x^2 (1, C, 1)."""


def quantize_pass(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool, keep: Keep, with_codes: bool, with_sums: bool
) -> Quantized:
    """Forward kernel: x (outer, C, inner), the other tensors (1, C, 1)."""
    total = square = None
    if with_sums:
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x.sum((0, 2), keepdim=True, dtype=dtype)
        square = torch.linalg.vector_norm(x, dim=(0, 2), keepdim=True, dtype=dtype).square()
    t = x / scale
    byte = None
    if keep == "residual":
        levels, residual, side = _split_(t, low, high, mid_rise)
        if mid_rise:  # a clipped level is half a step from its edge
            residual.sub_(side.abs().mul_(residual))
        byte = residual.mul_(RESIDUAL_STEPS).add_(side, alpha=CLIPPED).round_().to(torch.int8)
    else:
        if keep == "mask":
            clipped = _clip_to_edges(t, low, high, mid_rise)
            byte = torch.eq(clipped, t, out=clipped).to(torch.int8)
        levels = _clip_(_round_(t, mid_rise), low, high)
    codes = (levels - low).to(torch.uint8) if with_codes else None
    return Quantized(levels.mul_(scale).to(x.dtype), byte, codes, total, square)


def dequantize_pass(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantized tensor, from its codes."""
    return codes.to(torch.promote_types(dtype, scale.dtype)).add_(low).mul_(scale).to(dtype)


class Gradients(NamedTuple):
    """Result of `gradient_pass`; None for parts that were not requested."""

    x: Tensor | None
    """In the gradient's shape and dtype."""
    scale: Tensor | None
    zero_point: Tensor | None
    """(1, C, 1), without LSQ's gradient scale."""


def gradient_pass(
    saved: Tensor,
    grad: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    mid_rise: bool,
    exact: bool,
    needs_x: bool,
    learned: bool,
    residual_gradient: bool,
) -> Gradients:
    """Backward kernel: `saved` is x if `exact`, else the byte of `quantize_pass`; (outer, C, inner) like grad."""
    if exact:
        _, residual, side = _split_(saved / scale, low, high, mid_rise)
    else:
        residual = saved.to(scale.dtype)
        side = (residual / (2 * CLIPPED - 1)).round_()  # +-1 for +-127 only; trunc would be slow
        residual.div_(RESIDUAL_STEPS)
    outside = side.abs()
    inside = 1.0 - outside
    grad_x = (grad * inside).to(grad.dtype) if needs_x else None
    if not learned:
        return Gradients(grad_x, None, None)
    sum_side, sum_outside = _sum(side.mul_(grad)), _sum(outside.mul_(grad))
    # low where side is -1, high where it is 1
    grad_scale = 0.5 * ((high - low) * sum_side + (high + low) * sum_outside)
    if residual_gradient:
        grad_scale = grad_scale + _sum(residual.mul_(inside).mul_(grad))
    return Gradients(grad_x, grad_scale, -scale * sum_outside)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2), keepdim=True)


P = TypeVar("P", Quantized, Gradients)


def in_blocks(kernel: Callable[..., P], x: Tensor, *arguments: Any) -> P:
    """Result of a pass over x (outer, C, inner) and tensors of its shape or (1, C, 1), computed block by block."""
    x, *others = (value.contiguous() if isinstance(value, Tensor) else value for value in (x, *arguments))
    blocks = _blocks(x)
    if len(blocks) == 1:
        return kernel(x, *others)
    whole: list[Tensor | None] = []
    for rows, columns in blocks:
        block = x[:, rows, columns]
        part = kernel(block, *(_cut(value, x.shape, rows, columns) for value in others))
        if not whole:  # sums start at zero
            whole = [
                t if t is None else t.new_empty(x.shape) if t.shape == block.shape else t.new_zeros(1, x.shape[1], 1)
                for t in part
            ]
        for result, of_block in zip(whole, part, strict=True):
            if result is not None and of_block is not None:
                if result.shape == x.shape:
                    result[:, rows, columns] = of_block
                else:
                    result[:, rows] += of_block
    return type(part)._make(whole)


def _cut(value: Any, shape: torch.Size, rows: slice, columns: slice) -> Any:
    """View of a block of a tensor of this shape, or of the rows of one per channel; a flag itself."""
    if not isinstance(value, Tensor):
        return value
    return value[:, rows, columns] if value.shape == shape else value[:, rows]


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Slices (channels, inner) of a tensor, small enough to stay in a CPU's cache throughout a kernel."""
    outer, channels, inner = x.shape
    if x.device.type != "cpu" or outer > 1 or x.numel() <= 4 * BLOCK:  # a smaller one fits the cache
        return [(slice(None), slice(None))]
    rows, columns = max(BLOCK // inner, 1), BLOCK
    return [
        (slice(row, row + rows), slice(column, column + columns))
        for row in range(0, channels, rows)
        for column in range(0, inner, columns)
    ]
