"""Quantized linear and convolutional layers: y = Q(x) Q(W)^T + b, with a quantizer for x and one for W.

The quantized weight is computed once per optimizer step and shared by all calls (see `quantizers.step_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import Self

from qsam2.quantizers import Quantizer
from qsam2.quantizers.fake_quant import Codes, dequantize
from qsam2.quantizers.step_cache import clear_after_backward, hidden_from_checkpointing, version_of

M = TypeVar("M", bound=nn.Module)


class CachedWeight(NamedTuple):
    """A quantized weight, and the tensors with versions that it was computed from."""

    tensor: Tensor
    source: tuple[object, ...]
    has_graph: bool


class QuantizedLayer(nn.Module):
    """Base of layers whose weight and input are fake-quantized; None as a quantizer leaves its tensor in float."""

    channel_dim: ClassVar[int]
    """Dimension of the weight's output channels."""
    reads_codes: ClassVar[bool] = False
    """True if the gradient of the weight can be computed from the `Codes` of the input."""

    weight: Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    _cached: CachedWeight | None

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer | None = None, input_quantizer: Quantizer | None = None
    ) -> Self:
        """Quantized version of `layer`; it shares the parameters and all attributes."""
        module: Any = recast(cls, layer)
        module.weight_quantizer, module.input_quantizer = weight_quantizer, input_quantizer
        module._cached = None
        return module

    def quantized_input(self, x: Tensor) -> Tensor:
        """Fake-quantized input, of the same shape."""
        quantizer = self.input_quantizer
        if quantizer is None:
            return x
        needs_codes = self.reads_codes and self.weight.requires_grad and torch.is_grad_enabled()
        return quantizer(x, with_codes=True) if needs_codes and isinstance(quantizer, Quantizer) else quantizer(x)

    def quantized_weight(self) -> Tensor:
        """Fake-quantized weight of the current optimizer step, in autocast's dtype if it is enabled."""
        weight, quantizer = self.weight, self.weight_quantizer
        if quantizer is None:
            return weight
        if torch.compiler.is_compiling():
            return quantizer(weight)
        # parameters() and buffers() look for duplicates, which would dominate the time of a cached call
        own = (t for inner in quantizer.modules() for t in (*inner._parameters.values(), *inner._buffers.values()))
        tensors = [weight, *(tensor for tensor in own if tensor is not None)]
        needs_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

        def source() -> tuple[object, ...]:
            return dtype, quantizer.training, *((tensor.data_ptr(), version_of(tensor)) for tensor in tensors)

        cached = self._cached
        if cached is None or cached.source != source() or needs_graph > cached.has_graph:
            # an inference tensor could not be used in a later training step
            with torch.inference_mode(False), torch.set_grad_enabled(needs_graph), hidden_from_checkpointing():
                quantized = quantizer(weight).to(dtype)
            if needs_graph:
                clear_after_backward(quantized, self, "_cached")
            elif torch.equal(quantized, weight):
                quantized = weight.detach()  # a finalized weight needs no second copy
            self._cached = cached = CachedWeight(quantized, source(), needs_graph)
        return cached.tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cached = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


class QuantLinear(QuantizedLayer, nn.Linear):
    """Q(x) Q(W)^T + b, the bias in float.

    For the gradient of W the input is saved as codes, one byte per element instead of four (ours).
    """

    channel_dim = 0
    reads_codes = True

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        codes = Codes.of(x)
        if codes is None:
            return F.linear(x, weight, self.bias)
        # not a view from the Function: sam2 rotates queries and keys in place, which such a view does not allow
        rows: Tensor = _LinearOfCodes.apply(x.reshape(-1, x.shape[-1]), weight, self.bias, *codes)
        return rows.view(*x.shape[:-1], self.out_features)


class _LinearOfCodes(torch.autograd.Function):
    """`F.linear` of x (N, in) that saves the codes (..., in) of x instead of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, low: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, codes, scale, low)
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, codes, scale, low = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype)
        if needs_weight:
            # rounded as in the forward pass: to its dtype, then to autocast's
            x = dequantize(codes, scale, low, ctx.dtype).to(grad.dtype)
            grad_weight = (grad.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution of quantized input and weight, depthwise ones included."""

    channel_dim = 0

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """Transposed convolution of quantized input and weight. Its weight is (in, out / groups, h, w)."""

    channel_dim = 1
    padding: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # SAM2 gives no output_size
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        x, weight, options = self.quantized_input(input), self.quantized_weight(), (self.groups, self.dilation)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding, self.output_padding, *options)


def recast(cls: type[M], module: nn.Module) -> M:
    """Copy of `module` as class `cls`; tensors, submodules and hooks are shared, the dictionaries of them copied."""
    copy = cls.__new__(cls)
    for name, value in vars(module).items():
        copy.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return copy
