"""The one fake-quantization operation of all methods: quantize and dequantize, with gradients to input, step and clip.

Notation: t = x / scale; a level is a grid value in steps, low = qmin - zero_point, high = qmax - zero_point;
out = scale * level(t), level(t) = clip([t]; low, high), or clip([t - 1/2] + 1/2; low, high) on a mid-rise grid.

Gradients (LSQ, arXiv 1902.08153, eq. 3; PACT, arXiv 1805.06085), [.] straight through:
  inside    d out/dx = 1,       d out/dscale = level - t,  d out/dzero_point = 0
  clipped   d out/dx = 0 or 1,  d out/dscale = low | high, d out/dzero_point = -scale
"Inside" is low <= t <= high, half a step wider on a mid-rise grid, whose outer cells reach that far (ParetoQ's rule).
Bounds l, u get PACT's gradients by the chain rule through scale = (u - l)/n and zero_point = -l/scale; PACT itself
leaves the residual level - t out (`residual_gradient=False`).

Memory (ours). A weight is a parameter, alive anyhow: it is saved by reference and t is computed again, exactly. An
activation is kept by nobody else (its consumer saves the quantized copy), so one byte an element is saved in its place:
below | above | level - t in steps of 1/252, whose error (at most 1/504 a value, random in sign) touches the scale's
gradient alone. Without a gradient for scale or zero point the byte is only the mask, and with the identity gradient
nothing is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RESIDUAL_STEPS = 252  # level - t in [-1/2, 1/2] becomes -126..126
CLIPPED = 127  # -127 below, 127 above
BLOCK = 2**16
"""Elements that the eager kernels work on at a time on a CPU: half a dozen float copies fit a core's cache."""

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
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool, keep: Keep
) -> tuple[Tensor, Tensor | None]:
    """Forward kernel: x (outer, C, inner), the rest (1, C, 1) -> out in x's shape and dtype, the saved byte (int8)."""
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
    return levels.mul_(scale).to(x.dtype), byte


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
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mid_rise: bool, keep: Keep
) -> tuple[Tensor, Tensor | None]:
    """`quantize_pass`, a block at a time."""
    blocks = _blocks(x)
    if len(blocks) == 1:
        return quantize_pass(x, scale, low, high, mid_rise, keep)
    out = torch.empty_like(x)
    byte = None if keep == "nothing" else torch.empty_like(x, dtype=torch.int8)
    for rows, columns in blocks:
        part = quantize_pass(x[:, rows, columns], scale[:, rows], low[:, rows], high[:, rows], mid_rise, keep)
        out[:, rows, columns] = part[0]
        if byte is not None and part[1] is not None:
            byte[:, rows, columns] = part[1]
    return out, byte


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
    if x.device.type != "cpu" or outer > 1 or x.numel() <= 16 * BLOCK:  # a smaller one stays there anyhow
        return [(slice(None), slice(None))]
    rows, columns = max(BLOCK // inner, 1), BLOCK
    return [
        (slice(row, row + rows), slice(column, column + columns))
        for row in range(0, channels, rows)
        for column in range(0, inner, columns)
    ]


class Kernels(NamedTuple):
    """The two passes as they are run."""

    quantize: Callable[..., tuple[Tensor, Tensor | None]]
    gradients: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]
    min_elements: int
    """Smaller tensors are left to the eager kernels."""


EAGER = Kernels(quantize_in_blocks, gradients_in_blocks, min_elements=0)
_chosen = EAGER


def use_kernels(kernels: Kernels) -> None:
    """What training forwards and backwards of this process run from now on. Inference is eager always."""
    global _chosen
    _chosen = kernels


def _kernels(x: Tensor) -> Kernels:
    return _chosen if x.numel() >= _chosen.min_elements else EAGER


def _flat_view(x: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """(outer, C, inner) of x, C the dimension along which the broadcastable `scale` varies, or 1."""
    if scale.numel() == 1:
        return 1, 1, x.numel()
    dim = next(dim for dim, size in enumerate(scale.shape) if size > 1)
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


def _plain(x: Tensor, view: tuple[int, int, int]) -> Tensor:
    """x in the kernels' shape, of which autograd does not know: a compiled kernel is compiled again for each base."""
    return x.reshape(view).data


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        mid_rise: bool,
        identity: bool,
        exact: bool,
        residual_gradient: bool,
        num_samples: int,
    ) -> Tensor:
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.mid_rise, ctx.identity, ctx.exact, ctx.learned = mid_rise, identity, exact, learned
        ctx.residual_gradient = residual_gradient
        ctx.largest_level = qmax + 0.5 if mid_rise else float(qmax)
        ctx.num_samples = num_samples
        ctx.view, ctx.scale_shape = _flat_view(x, scale), scale.shape
        scale, zero_point = scale.view(1, -1, 1), zero_point.view(1, -1, 1)
        low, high = qmin - zero_point, qmax - zero_point
        keep: Keep = "nothing"
        if not exact and learned:
            keep = "residual"
        elif not exact and not identity:
            keep = "mask"
        out, byte = _kernels(x).quantize(_plain(x, ctx.view), scale, low, high, mid_rise, keep)
        ctx.save_for_backward(x if exact else byte, scale, low, high)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, scale, low, high = ctx.saved_tensors
        if not ctx.learned and ctx.identity:
            return (grad, *[None] * 9)
        if not ctx.learned and not ctx.exact:
            return (grad * saved.view(grad.shape), *[None] * 9)
        needs_x, needs_scale, needs_zero_point = ctx.needs_input_grad[:3]
        grad_x, sum_side, sum_outside, sum_residual = _kernels(grad).gradients(
            _plain(saved, ctx.view),
            _plain(grad, ctx.view),
            scale,
            low,
            high,
            ctx.mid_rise,
            ctx.exact,
            needs_x and not ctx.identity,
            ctx.learned,
            needs_scale and ctx.residual_gradient,
        )
        if grad_x is not None:
            grad_x = grad_x.view(grad.shape)
        elif needs_x:  # identity
            grad_x = grad
        grad_scale = grad_zero_point = None
        if ctx.learned:
            # LSQ's 1/sqrt(N Qp), N a sample's elements that share the step: balances its update with the weights'.
            elements = max(grad.numel() // (scale.numel() * ctx.num_samples), 1)
            factor = gradient_scale(elements, ctx.largest_level)
        if needs_scale:
            # low where side is -1, high where it is 1
            grad_scale = 0.5 * ((high - low) * sum_side + (high + low) * sum_outside)
            if sum_residual is not None:
                grad_scale = grad_scale + sum_residual
            grad_scale = grad_scale.mul_(factor).to(scale.dtype).view(ctx.scale_shape)
        if needs_zero_point:
            grad_zero_point = (sum_outside * scale * -factor).to(scale.dtype).view(ctx.scale_shape)
        return (grad_x, grad_scale, grad_zero_point, *[None] * 7)


def gradient_scale(elements: int, largest_level: float) -> float:
    """LSQ's scale of the gradients of step and zero point, 1/sqrt(N Qp)."""
    return 1.0 / math.sqrt(elements * largest_level)


def broadcast_shape(channels: int, ndim: int, channel_dim: int) -> list[int]:
    """Shape that lines a (C,) tensor up with dimension `channel_dim` of an `ndim`-dimensional one."""
    shape = [1] * ndim
    if channels > 1:
        shape[channel_dim] = channels
    return shape


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    *,
    channel_dim: int = 0,
    mid_rise: bool = False,
    identity_gradient: bool = False,
    exact_gradient: bool = True,
    residual_gradient: bool = True,
    num_samples: int = 1,
) -> Tensor:
    """Fake-quantizes x of any shape and float dtype; `scale`, `zero_point` are (C,) along `channel_dim`, or (1,).

    Returns x's shape and dtype. Arithmetic is in float32 (float64 for float64). `exact_gradient=False` saves one byte
    an element for the backward pass in place of x. `residual_gradient=False`: what is inside adds nothing to the
    scale's gradient. N in that gradient's scale counts the elements of one of x's `num_samples`.
    """
    shape = broadcast_shape(scale.numel(), x.ndim, channel_dim)
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        return _FakeQuantize.apply(
            x,
            scale,
            zero_point,
            qmin,
            qmax,
            mid_rise,
            identity_gradient,
            exact_gradient,
            residual_gradient,
            num_samples,
        )
    return to_levels(x, scale, qmin - zero_point, qmax - zero_point, mid_rise).mul_(scale).to(x.dtype)
