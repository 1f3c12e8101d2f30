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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RESIDUAL_STEPS = 252  # level - t in [-1/2, 1/2] becomes -126..126
CLIPPED = 127  # -127 below, 127 above


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
        low, high = qmin - zero_point, qmax - zero_point
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.mid_rise, ctx.identity, ctx.exact, ctx.learned = mid_rise, identity, exact, learned
        ctx.residual_gradient = residual_gradient
        ctx.largest_level = qmax + 0.5 if mid_rise else float(qmax)
        ctx.num_samples = num_samples
        t = x / scale
        saved = None
        if exact:
            saved = x
            levels = _levels_(t, low, high, mid_rise)
        elif learned:
            levels, residual, side = _split_(t, low, high, mid_rise)
            byte = residual.mul_(RESIDUAL_STEPS).add_(side, alpha=2 * RESIDUAL_STEPS)
            saved = byte.round_().clamp_(-CLIPPED, CLIPPED).to(torch.int8)
        else:
            if not identity:
                clipped = _clip_to_edges(t, low, high, mid_rise)
                saved = torch.eq(clipped, t, out=clipped).to(torch.int8)
            levels = _levels_(t, low, high, mid_rise)
        ctx.save_for_backward(saved, scale, low, high)
        return levels.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, scale, low, high = ctx.saved_tensors
        if not ctx.learned and not ctx.exact:
            return (grad if ctx.identity else grad * saved, *[None] * 9)
        if ctx.exact:
            _, residual, side = _split_(saved / scale, low, high, ctx.mid_rise)
        else:
            residual = saved.to(scale.dtype)
            side = (residual / (2 * CLIPPED - 1)).round_()  # +-1 for +-127 only; trunc would be slow
            residual.div_(RESIDUAL_STEPS)
        outside = side.abs()
        inside = 1.0 - outside
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            grad_x = grad if ctx.identity else (grad * inside).to(grad.dtype)
        if ctx.learned:
            # LSQ's 1/sqrt(N Qp), N a sample's elements that share the step: balances its update with the weights'.
            elements = max(grad.numel() // (scale.numel() * ctx.num_samples), 1)
            factor = gradient_scale(elements, ctx.largest_level)
            # low where side is -1, high where it is 1
            sum_outside = _sum_to(outside.mul_(grad), scale)
            sum_side = _sum_to(side.mul_(grad), scale)
            if ctx.needs_input_grad[1]:
                grad_scale = 0.5 * ((high - low) * sum_side + (high + low) * sum_outside)
                if ctx.residual_gradient:
                    grad_scale = grad_scale + _sum_to(residual.mul_(inside).mul_(grad), scale)
                grad_scale = grad_scale.mul_(factor).to(scale.dtype)
            if ctx.needs_input_grad[2]:
                grad_zero_point = sum_outside.mul_(scale).mul_(-factor)
        return (grad_x, grad_scale, grad_zero_point, *[None] * 7)


def gradient_scale(elements: int, largest_level: float) -> float:
    """LSQ's scale of the gradients of step and zero point, 1/sqrt(N Qp)."""
    return 1.0 / math.sqrt(elements * largest_level)


def _sum_to(x: Tensor, scale: Tensor) -> Tensor:
    return x.sum_to_size(scale.shape).to(scale.dtype)


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
