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
nothing is saved. The consumer, too, can do with a byte: `Codes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsam2.quantizers.observers import sums
from qsam2.quantizers.passes import (
    Gradients,
    Keep,
    Layout,
    Quantized,
    dequantize_pass,
    gradients_in_blocks,
    quantize_in_blocks,
    to_levels,
)

Follow = Callable[[Tensor, int], None]
"""Takes the sums of x and x^2 (2, C) and how many elements each is of."""


class Kernels(NamedTuple):
    """The passes as they are run."""

    quantize: Callable[..., Quantized]
    gradients: Callable[..., Gradients]
    dequantize: Callable[..., Tensor]
    min_elements: int
    """Smaller tensors are left to the eager kernels."""


EAGER = Kernels(quantize_in_blocks, gradients_in_blocks, dequantize_pass, min_elements=0)
_chosen = EAGER


def use_kernels(kernels: Kernels) -> None:
    """What training forwards and backwards of this process run from now on. Inference is eager always."""
    global _chosen
    _chosen = kernels


def _kernels(x: Tensor) -> Kernels:
    return _chosen if x.numel() >= _chosen.min_elements else EAGER


@dataclass(frozen=True)
class _Options:
    """What is not a tensor, see `fake_quantize`."""

    qmin: int
    qmax: int
    channel_dim: int
    mid_rise: bool
    identity: bool
    exact: bool
    residual_gradient: bool
    num_samples: int
    with_codes: bool
    follow: Follow | None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.options, ctx.learned, ctx.layout = options, learned, Layout.of(x, scale.numel(), options.channel_dim)
        scale, zero_point = scale.view(1, -1, 1), zero_point.view(1, -1, 1)
        low, high = options.qmin - zero_point, options.qmax - zero_point
        keep: Keep = "nothing"
        if not options.exact and learned:
            keep = "residual"
        elif not options.exact and not options.identity:
            keep = "mask"
        flat = ctx.layout.flat(x)
        given = (options.mid_rise, keep, options.with_codes, options.follow is not None)
        found = _kernels(x).quantize(flat, scale, low, high, *given)
        ctx.save_for_backward(x if options.exact else found.byte, scale, low, high)
        if options.follow is not None and found.total is not None and found.square is not None:
            options.follow(torch.stack([found.total.view(-1), found.square.view(-1)]), x.numel() // scale.numel())
        codes = None
        if found.codes is not None:
            codes = ctx.layout.back(found.codes)
            ctx.mark_non_differentiable(codes)
        return ctx.layout.back(found.out), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, scale, low, high = ctx.saved_tensors
        options, learned, layout = ctx.options, ctx.learned, ctx.layout
        needs_x = ctx.needs_input_grad[0]
        if not learned and options.identity:
            return grad, None, None, None
        if not learned and not options.exact:
            return layout.back(layout.flat(grad) * saved), None, None, None
        found = _kernels(grad).gradients(
            layout.flat(saved) if options.exact else saved,
            layout.flat(grad),
            scale,
            low,
            high,
            options.mid_rise,
            options.exact,
            needs_x and not options.identity,
            learned,
            options.residual_gradient,
        )
        grad_x = grad_scale = grad_zero_point = None
        if needs_x:
            grad_x = grad if found.x is None else layout.back(found.x)
        # LSQ's 1/sqrt(N Qp), N a sample's elements that share the step: balances its update with the weights'.
        elements = max(grad.numel() // (scale.numel() * options.num_samples), 1)
        factor = gradient_scale(elements, options.qmax + 0.5 if options.mid_rise else float(options.qmax))
        if found.scale is not None and ctx.needs_input_grad[1]:
            grad_scale = (found.scale * factor).to(scale.dtype).view(-1)
        if found.zero_point is not None and ctx.needs_input_grad[2]:
            grad_zero_point = (found.zero_point * factor).to(scale.dtype).view(-1)
        return grad_x, grad_scale, grad_zero_point, None


class Codes(NamedTuple):
    """A quantized tensor in a byte an element, for a consumer that would otherwise save it in float for its backward:
    x = (codes + low) * scale, exactly.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor

    @classmethod
    def of(cls, quantized: Tensor) -> Codes | None:
        """Those of what `fake_quantize(with_codes=True)` returned; None for any other tensor."""
        return getattr(quantized, "qsam2_codes", None)


def dequantize(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """The quantized tensor of `Codes`, in their shape and layout."""
    layout = Layout.of(codes, scale.numel(), _varying_dim(scale))
    out = _kernels(codes).dequantize(layout.flat(codes), scale.view(1, -1, 1), low.view(1, -1, 1), dtype)
    return layout.back(out)


def _varying_dim(scale: Tensor) -> int:
    return next((dim for dim, size in enumerate(scale.shape) if size > 1), 0)


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
    with_codes: bool = False,
    follow: Follow | None = None,
) -> Tensor:
    """Fake-quantizes x of any shape and float dtype; `scale`, `zero_point` are (C,) along `channel_dim`, or (1,).

    Returns x's shape and dtype. Arithmetic is in float32 (float64 for float64). `exact_gradient=False` saves one byte
    an element for the backward pass in place of x. `residual_gradient=False`: what is inside adds nothing to the
    scale's gradient. N in that gradient's scale counts the elements of one of x's `num_samples`. `with_codes`: where a
    graph is built the result carries its `Codes`. `follow` is called with sums of x, from the same reading of it.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        options = _Options(
            qmin=qmin,
            qmax=qmax,
            channel_dim=channel_dim,
            mid_rise=mid_rise,
            identity=identity_gradient,
            exact=exact_gradient,
            residual_gradient=residual_gradient,
            num_samples=num_samples,
            with_codes=with_codes,
            follow=follow,
        )
        out, codes = _FakeQuantize.apply(x, scale, zero_point, options)
        if codes is not None:
            shape = broadcast_shape(scale.numel(), x.ndim, channel_dim)
            scale, zero_point = scale.detach().view(shape), zero_point.detach().view(shape)
            out.qsam2_codes = Codes(codes, scale, qmin - zero_point)
        return out
    if follow is not None:
        follow(*sums(x, channel_dim if scale.numel() > 1 else None))
    shape = broadcast_shape(scale.numel(), x.ndim, channel_dim)
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return to_levels(x, scale, qmin - zero_point, qmax - zero_point, mid_rise).mul_(scale).to(x.dtype)
