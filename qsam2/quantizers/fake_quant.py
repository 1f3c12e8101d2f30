"""Fake quantization, the one operation of all methods: quantize and dequantize, with gradients to input, step and clip.

Notation: t = x / scale; a level is a grid value in steps, low = qmin - zero_point, high = qmax - zero_point;
out = scale * level(t), level(t) = clip([t]; low, high), or clip([t - 1/2] + 1/2; low, high) on a mid-rise grid.

Gradients (LSQ, arXiv 1902.08153, eq. 3; PACT, arXiv 1805.06085), [.] straight through:
  inside    d out/dx = 1,       d out/dscale = level - t,  d out/dzero_point = 0
  clipped   d out/dx = 0 or 1,  d out/dscale = low | high, d out/dzero_point = -scale
"Inside" is low <= t <= high, half a step wider on a mid-rise grid, whose outer cells reach that far (ParetoQ's rule).
Bounds l, u get PACT's gradients by the chain rule through scale = (u - l)/n and zero_point = -l/scale; PACT itself
omits the residual level - t (`residual_gradient=False`).

Memory (ours). A weight is a parameter, in memory anyway: it is saved by reference and t is recomputed exactly. An
activation would be kept for this operation alone (its consumer saves the quantized copy), so one byte per element is
saved instead: below | above | level - t in steps of 1/252, whose error (at most 1/504 per value, random in sign) enters
the scale's gradient only. Without a gradient to scale or zero point the byte is just the mask, and with the identity
gradient nothing is saved. The consumer can save a byte per element, too: `Codes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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
    gradient_pass,
    in_blocks,
    quantize_pass,
    to_levels,
)

OnSums = Callable[[Tensor, int], None]
"""Called with the sums of x and x^2 (2, C) and the number of elements in each sum."""


class Kernels(NamedTuple):
    """Implementations of the passes of `passes`: eager or compiled."""

    quantize: Callable[..., Quantized]
    gradients: Callable[..., Gradients]
    dequantize: Callable[..., Tensor]
    min_elements: int
    """Smaller tensors use the eager kernels."""


EAGER = Kernels(partial(in_blocks, quantize_pass), partial(in_blocks, gradient_pass), dequantize_pass, min_elements=0)
_chosen = EAGER


def use_kernels(kernels: Kernels) -> None:
    """Set the kernels of all training forwards and backwards of this process. Inference is always eager."""
    global _chosen
    _chosen = kernels


def _kernels(x: Tensor) -> Kernels:
    return _chosen if x.numel() >= _chosen.min_elements else EAGER


class _Options(NamedTuple):
    """Arguments of `fake_quantize` that are not tensors, in its order."""

    qmin: int
    qmax: int
    channel_dim: int
    mid_rise: bool
    identity_gradient: bool
    exact_gradient: bool
    residual_gradient: bool
    num_samples: int
    with_codes: bool
    on_sums: OnSums | None


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
        if not options.exact_gradient and learned:
            keep = "residual"
        elif not options.exact_gradient and not options.identity_gradient:
            keep = "mask"
        flags = options.mid_rise, keep, options.with_codes, options.on_sums is not None
        quantized = _kernels(x).quantize(ctx.layout.flat(x), scale, low, high, *flags)
        ctx.save_for_backward(x if options.exact_gradient else quantized.byte, scale, low, high)
        if options.on_sums is not None and quantized.total is not None and quantized.square is not None:
            sums = torch.stack([quantized.total.view(-1), quantized.square.view(-1)])
            options.on_sums(sums, x.numel() // scale.numel())
        codes = None
        if quantized.codes is not None:
            codes = ctx.layout.back(quantized.codes)
            ctx.mark_non_differentiable(codes)
        return ctx.layout.back(quantized.out), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, scale, low, high = ctx.saved_tensors
        options, learned, layout = ctx.options, ctx.learned, ctx.layout
        needs_x = ctx.needs_input_grad[0]
        if not learned and options.identity_gradient:
            return grad, None, None, None
        if not learned and not options.exact_gradient:
            return layout.back(layout.flat(grad) * saved), None, None, None
        flat = layout.flat(saved) if options.exact_gradient else saved
        flags = options.exact_gradient, needs_x and not options.identity_gradient, learned, options.residual_gradient
        gradients = _kernels(grad).gradients(flat, layout.flat(grad), scale, low, high, options.mid_rise, *flags)
        grad_x = grad_scale = grad_zero_point = None
        if needs_x:
            grad_x = grad if gradients.x is None else layout.back(gradients.x)
        # LSQ's 1/sqrt(N Qp), N the elements of one sample that share the step: balances its update with the weights'.
        elements = max(grad.numel() // (scale.numel() * options.num_samples), 1)
        factor = gradient_scale(elements, options.qmax + 0.5 if options.mid_rise else float(options.qmax))
        if gradients.scale is not None and ctx.needs_input_grad[1]:
            grad_scale = (gradients.scale * factor).to(scale.dtype).view(-1)
        if gradients.zero_point is not None and ctx.needs_input_grad[2]:
            grad_zero_point = (gradients.zero_point * factor).to(scale.dtype).view(-1)
        return grad_x, grad_scale, grad_zero_point, None


class Codes(NamedTuple):
    """A quantized tensor in one byte per element: x = (codes + low) * scale, exactly.

    A consumer saves it for its backward in place of the float tensor.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor

    @classmethod
    def of(cls, quantized: Tensor) -> Codes | None:
        """Codes of a tensor that `fake_quantize(with_codes=True)` returned; None for any other tensor."""
        return getattr(quantized, "qsam2_codes", None)


def dequantize(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantized tensor of `Codes`, in their shape and layout."""
    varying_dim = next((dim for dim, size in enumerate(scale.shape) if size > 1), 0)
    layout = Layout.of(codes, scale.numel(), varying_dim)
    out = _kernels(codes).dequantize(layout.flat(codes), scale.view(1, -1, 1), low.view(1, -1, 1), dtype)
    return layout.back(out)


def gradient_scale(elements: int, largest_level: float) -> float:
    """Factor of the gradients of step and zero point in LSQ, 1/sqrt(N Qp)."""
    return 1.0 / math.sqrt(elements * largest_level)


def broadcast_shape(channels: int, ndim: int, channel_dim: int) -> list[int]:
    """Shape that aligns a (C,) tensor with dimension `channel_dim` of an `ndim`-dimensional tensor."""
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
    on_sums: OnSums | None = None,
) -> Tensor:
    """Fake-quantize x of any shape and float dtype; `scale`, `zero_point` are (C,) along `channel_dim`, or (1,).

    Returns x's shape and dtype. Arithmetic is in float32 (float64 for float64).

    Args:
        exact_gradient: False saves one byte per element for the backward pass instead of x.
        residual_gradient: False leaves unclipped values out of the scale's gradient.
        num_samples: of x; N in the gradient scale counts the elements of one sample.
        with_codes: if a graph is built, the result carries its `Codes`.
        on_sums: called with the sums of x and x^2, computed in the same pass.
    """
    shape = broadcast_shape(scale.numel(), x.ndim, channel_dim)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        gradient = identity_gradient, exact_gradient, residual_gradient
        options = _Options(qmin, qmax, channel_dim, mid_rise, *gradient, num_samples, with_codes, on_sums)
        out, codes = _FakeQuantize.apply(x, scale, zero_point, options)
        if codes is not None:
            out.qsam2_codes = Codes(codes, scale.detach().view(shape), (qmin - zero_point.detach()).view(shape))
        return out
    if on_sums is not None:
        on_sums(*sums(x, channel_dim if scale.numel() > 1 else None))
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return to_levels(x, scale, qmin - zero_point, qmax - zero_point, mid_rise).mul_(scale).to(x.dtype)
