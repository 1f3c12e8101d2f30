"""What is computed of a quantized tensor: the passes forward, backward and from codes, and the eager way to run them.

Notation as in `fake_quant`. Tensors come as (outer, C, inner), what is one value a channel as (1, C, 1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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
    t = t.sub_(0.5).round_().add_(0.5) if mid_rise else t.round_()
    return _clip_(t, low, high)


def _clip_(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(t, high, out=t), low, out=t)


def _clip_to_edges(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> Tensor:
    """A copy of t clipped to where "inside" ends."""
    edge = 0.5 if mid_rise else 0.0
    return torch.maximum(torch.minimum(t, high + edge), low - edge)


def _split_(t: Tensor, low: Tensor, high: Tensor, mid_rise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels; level - t where inside; side: -1 below, 0 inside, 1 above. Overwrites t."""
    clipped = _clip_to_edges(t, low, high, mid_rise)
    side = t.sub_(clipped).sign_()
    levels = _levels_(clipped.clone(), low, high, mid_rise)
    return levels, torch.sub(levels, clipped, out=clipped), side


def quantize_pass(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool, keep: Keep, with_codes: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward kernel: x (outer, C, inner), the rest (1, C, 1) -> out in x's shape and dtype, the saved byte (int8), and
    `with_codes` level - low (uint8).
    """
    t = x / scale
    byte = None
    if keep == "residual":
        levels, residual, side = _split_(t, low, high, mid_rise)
        byte = residual.mul_(RESIDUAL_STEPS).add_(side, alpha=2 * RESIDUAL_STEPS)
        byte = byte.round_().clamp_(-CLIPPED, CLIPPED).to(torch.int8)
    else:
        if keep == "mask":
            clipped = _clip_to_edges(t, low, high, mid_rise)
            byte = torch.eq(clipped, t, out=clipped).to(torch.int8)
        levels = _levels_(t, low, high, mid_rise)
    codes = (levels - low).to(torch.uint8) if with_codes else None
    return levels.mul_(scale).to(x.dtype), byte, codes


def dequantize_pass(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_pass` gave, from its codes."""
    return codes.to(torch.promote_types(dtype, scale.dtype)).add_(low).mul_(scale).to(dtype)


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
    needs_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Backward kernel: `saved` is x if `exact`, else `quantize_pass`'s byte; (outer, C, inner) like grad.

    Returns grad masked to what is inside; if `learned` the sums a channel, (1, C, 1), of grad * side, grad * |side| and
    grad * (level - t) inside; None for what is not needed.
    """
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
        return grad_x, None, None, None
    sum_residual = _sum(residual.mul_(inside).mul_(grad)) if needs_residual else None
    return grad_x, _sum(side.mul_(grad)), _sum(outside.mul_(grad)), sum_residual


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2), keepdim=True)


def quantize_in_blocks(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool, keep: Keep, with_codes: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`quantize_pass`, a block at a time."""
    blocks = _blocks(x)
    if len(blocks) == 1:
        return quantize_pass(x, scale, low, high, mid_rise, keep, with_codes)
    out = torch.empty_like(x)
    byte = None if keep == "nothing" else torch.empty_like(x, dtype=torch.int8)
    codes = torch.empty_like(x, dtype=torch.uint8) if with_codes else None
    for rows, columns in blocks:
        at = (slice(None), rows, columns)
        part = quantize_pass(x[at], scale[:, rows], low[:, rows], high[:, rows], mid_rise, keep, with_codes)
        for whole, of_part in zip((out, byte, codes), part, strict=True):
            if whole is not None and of_part is not None:
                whole[at] = of_part
    return out, byte, codes


def gradients_in_blocks(
    saved: Tensor, grad: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool, *flags: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`gradient_pass`, a block at a time."""
    blocks = _blocks(grad)
    if len(blocks) == 1:
        return gradient_pass(saved, grad, scale, low, high, mid_rise, *flags)
    _, needs_x, learned, needs_residual = flags
    grad_x = torch.empty_like(grad) if needs_x else None
    sums = [torch.zeros_like(scale) if learned and needed else None for needed in (True, True, needs_residual)]
    for rows, columns in blocks:
        at = (slice(None), rows, columns)
        part = gradient_pass(saved[at], grad[at], scale[:, rows], low[:, rows], high[:, rows], mid_rise, *flags)
        if grad_x is not None and part[0] is not None:
            grad_x[at] = part[0]
        for total, of_part in zip(sums, part[1:], strict=True):
            if total is not None and of_part is not None:
                total[:, rows] += of_part
    return grad_x, sums[0], sums[1], sums[2]


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
