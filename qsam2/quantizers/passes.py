"""Views of a tensor as kernels read it, and what is computed of it: the forward, backward and code passes.

Notation as in `fake_quant`. Tensors come as (outer, C, inner), what is one value a channel as (1, C, 1). Compiled,
a pass reads and writes its tensors once; what is one value a channel is computed in the same call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
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


RESIDUAL_STEPS = 252  # level - t in [-1/2, 1/2] becomes -126..126
CLIPPED = 127  # -127 below, 127 above
BLOCK = 2**18
"""Elements that the eager kernels work on at a time on a CPU: half a dozen float copies stay in its cache. Forward
and back 1.4 and 1.1 times as fast as 2**16 on 6 and 25 MB; without blocks 25 MB take twice as long."""

Keep = Literal["residual", "mask", "nothing"]
"""What the forward pass saves of an element in a byte."""


def to_levels(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> Tensor:
    """Grid values in steps, in the dtype that x and scale promote to; `scale`, `low`, `high` broadcast to x."""
    return _levels_(x / scale, low, high, mid_rise)


# Minimum, maximum and products of signs rather than clamp and masks: those take 5-30 times as long on a CPU.


def _levels_(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> Tensor:
    """Rounds and clips t in place."""
    return _clip_(_round_(t, mid_rise), low, high)


def _round_(t: Tensor, mid_rise: bool) -> Tensor:
    return t.sub_(0.5).round_().add_(0.5) if mid_rise else t.round_()


def _clip_(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(t, high, out=t), low, out=t)


def _clip_to_edges(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> Tensor:
    """A copy of t clipped to where "inside" ends."""
    if mid_rise:
        low, high = low - 0.5, high + 0.5
    return torch.maximum(torch.minimum(t, high), low)


def _split_(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels; level - t where inside; side: -1 below, 0 inside, 1 above. Overwrites t."""
    clipped = _clip_to_edges(t, low, high, mid_rise)
    side = t.sub_(clipped).sign_()
    levels = _round_(clipped.clone(), mid_rise)
    if mid_rise:  # otherwise low and high are levels, and what lies between them is not rounded beyond
        _clip_(levels, low, high)
    return levels, torch.sub(levels, clipped, out=clipped), side


class Quantized(NamedTuple):
    """What `quantize_pass` gives; None for what it was not asked for."""

    out: Tensor
    """In x's shape and dtype."""
    byte: Tensor | None
    """What the backward pass needs of an element, int8."""
    codes: Tensor | None
    """level - low, uint8."""
    total: Tensor | None
    square: Tensor | None
    """Sums of x and x^2 (1, C, 1)."""


def quantize_pass(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    mid_rise: bool,
    keep: Keep,
    with_codes: bool,
    with_sums: bool,
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
        levels = _levels_(t, low, high, mid_rise)
    codes = (levels - low).to(torch.uint8) if with_codes else None
    return Quantized(levels.mul_(scale).to(x.dtype), byte, codes, total, square)


def dequantize_pass(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_pass` gave, from its codes."""
    return codes.to(torch.promote_types(dtype, scale.dtype)).add_(low).mul_(scale).to(dtype)


class Gradients(NamedTuple):
    """What `gradient_pass` gives; None for what it was not asked for."""

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
    """Backward kernel: `saved` is x if `exact`, else `quantize_pass`'s byte; (outer, C, inner) like grad."""
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


def quantize_in_blocks(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    mid_rise: bool,
    keep: Keep,
    with_codes: bool,
    with_sums: bool,
) -> Quantized:
    """`quantize_pass`, a block at a time."""
    x = x.contiguous()
    blocks, options = _blocks(x), (mid_rise, keep, with_codes, with_sums)
    if len(blocks) == 1:
        return quantize_pass(x, scale, low, high, *options)
    sums = torch.zeros_like(scale, dtype=torch.promote_types(x.dtype, torch.float32)) if with_sums else None
    whole = Quantized(
        torch.empty_like(x),
        None if keep == "nothing" else torch.empty_like(x, dtype=torch.int8),
        torch.empty_like(x, dtype=torch.uint8) if with_codes else None,
        sums,
        None if sums is None else sums.clone(),
    )
    for rows, columns in blocks:
        at = (slice(None), rows, columns)
        part = quantize_pass(x[at], scale[:, rows], low[:, rows], high[:, rows], *options)
        _assemble(whole, part, at, tensors=3)
    return whole


def gradients_in_blocks(
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
    """`gradient_pass`, a block at a time."""
    grad = grad.contiguous()
    blocks, options = _blocks(grad), (mid_rise, exact, needs_x, learned, residual_gradient)
    if len(blocks) == 1:
        return gradient_pass(saved, grad, scale, low, high, *options)
    sums = torch.zeros_like(scale) if learned else None
    whole = Gradients(torch.empty_like(grad) if needs_x else None, sums, None if sums is None else sums.clone())
    for rows, columns in blocks:
        at = (slice(None), rows, columns)
        part = gradient_pass(saved[at], grad[at], scale[:, rows], low[:, rows], high[:, rows], *options)
        _assemble(whole, part, at, tensors=1)
    return whole


def _assemble(
    whole: Iterable[Tensor | None], part: Iterable[Tensor | None], at: tuple[slice, slice, slice], *, tensors: int
) -> None:
    """Put a block's results into the whole: the first so many are tensors, the others sums a channel."""
    for index, (all_of, of_part) in enumerate(zip(whole, part, strict=True)):
        if all_of is None or of_part is None:
            continue
        if index < tensors:
            all_of[at] = of_part
        else:
            all_of[:, at[1]] += of_part


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Parts of an (outer, C, inner) tensor that stay in a CPU's cache from the first step of a kernel to the last."""
    outer, channels, inner = x.shape
    if x.device.type != "cpu" or outer > 1 or x.numel() <= 4 * BLOCK:  # a smaller one stays there anyhow
        return [(slice(None), slice(None))]
    rows, columns = max(BLOCK // inner, 1), BLOCK
    return [
        (slice(row, row + rows), slice(column, column + columns))
        for row in range(0, channels, rows)
        for column in range(0, inner, columns)
    ]
