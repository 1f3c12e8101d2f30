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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsam2.quantizers.layout import dense_order, permuted, permuted_back
from qsam2.quantizers.passes import Keep, dequantize_pass, gradients_in_blocks, quantize_in_blocks, to_levels


class Kernels(NamedTuple):
    """The passes as they are run."""

    quantize: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    gradients: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]
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
        with_codes: bool,
    ) -> tuple[Tensor, Tensor | None]:
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.mid_rise, ctx.identity, ctx.exact, ctx.learned = mid_rise, identity, exact, learned
        ctx.residual_gradient = residual_gradient
        ctx.largest_level = qmax + 0.5 if mid_rise else float(qmax)
        ctx.num_samples = num_samples
        ctx.order = dense_order(x) if scale.numel() == 1 else None
        ctx.view, ctx.scale_shape = _flat_view(x, scale), scale.shape
        scale, zero_point = scale.view(1, -1, 1), zero_point.view(1, -1, 1)
        low, high = qmin - zero_point, qmax - zero_point
        keep: Keep = "nothing"
        if not exact and learned:
            keep = "residual"
        elif not exact and not identity:
            keep = "mask"
        lying = permuted(x, ctx.order)
        out, byte, codes = _kernels(x).quantize(_plain(lying, ctx.view), scale, low, high, mid_rise, keep, with_codes)
        ctx.save_for_backward(x if exact else byte, scale, low, high)
        if codes is not None:
            codes = permuted_back(codes.view(lying.shape), ctx.order)
            ctx.mark_non_differentiable(codes)
        return permuted_back(out.view(lying.shape), ctx.order), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, scale, low, high = ctx.saved_tensors
        if not ctx.learned and ctx.identity:
            return (grad, *[None] * 10)
        lying = permuted(grad, ctx.order)
        if not ctx.learned and not ctx.exact:
            return (permuted_back(lying * saved.view(lying.shape), ctx.order), *[None] * 10)
        needs_x, needs_scale, needs_zero_point = ctx.needs_input_grad[:3]
        grad_x, sum_side, sum_outside, sum_residual = _kernels(grad).gradients(
            _plain(permuted(saved, ctx.order) if ctx.exact else saved, ctx.view),
            _plain(lying, ctx.view),
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
            grad_x = permuted_back(grad_x.view(lying.shape), ctx.order)
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
        return (grad_x, grad_scale, grad_zero_point, *[None] * 8)


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
    order = dense_order(codes) if scale.numel() == 1 else None
    lying = permuted(codes, order)
    flat = _plain(lying, _flat_view(codes, scale))
    out = _kernels(codes).dequantize(flat, scale.view(1, -1, 1), low.view(1, -1, 1), dtype)
    return permuted_back(out.view(lying.shape), order)


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
) -> Tensor:
    """Fake-quantizes x of any shape and float dtype; `scale`, `zero_point` are (C,) along `channel_dim`, or (1,).

    Returns x's shape and dtype. Arithmetic is in float32 (float64 for float64). `exact_gradient=False` saves one byte
    an element for the backward pass in place of x. `residual_gradient=False`: what is inside adds nothing to the
    scale's gradient. N in that gradient's scale counts the elements of one of x's `num_samples`. `with_codes`: where a
    graph is built the result carries its `Codes`.
    """
    shape = broadcast_shape(scale.numel(), x.ndim, channel_dim)
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        out, codes = _FakeQuantize.apply(
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
            with_codes,
        )
        if codes is not None:
            out.qsam2_codes = Codes(codes, scale.detach(), (qmin - zero_point).detach())
        return out
    return to_levels(x, scale, qmin - zero_point, qmax - zero_point, mid_rise).mul_(scale).to(x.dtype)
