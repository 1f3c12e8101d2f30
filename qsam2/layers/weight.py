"""What every layer with a quantized weight shares: its two quantizers, and one quantized weight an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from qsam2.layers.adopt import adopt
from qsam2.quantizers import Quantizer
from qsam2.quantizers.once_a_step import forget_after_backward, outside_checkpointing


class CachedWeight(NamedTuple):
    """A quantized weight and what it was computed from."""

    tensor: Tensor
    source: tuple[object, ...]
    has_graph: bool


class QuantizedLayer(nn.Module):
    """A layer whose weight and input are fake-quantized; a quantizer that is None leaves its tensor as it is (ours).

    The quantized weight is computed once an optimizer step and shared, see `quantizers.once_a_step`.
    """

    channel_dim: ClassVar[int]
    """The weight's dimension that counts output channels."""
    reads_codes: ClassVar[bool] = False
    """Whether the gradient of its weight makes do with the `Codes` of its input."""

    weight: Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    _cached: CachedWeight | None

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer | None = None, input_quantizer: Quantizer | None = None
    ) -> Self:
        """The quantized twin of `layer`; it shares the parameters and all attributes."""
        module: Any = adopt(cls, layer)
        module.weight_quantizer, module.input_quantizer = weight_quantizer, input_quantizer
        module._cached = None
        return module

    def quantized_input(self, x: Tensor) -> Tensor:
        """The fake-quantized input, of the same shape."""
        quantizer = self.input_quantizer
        if quantizer is None:
            return x
        needs_codes = self.reads_codes and self.weight.requires_grad and torch.is_grad_enabled()
        return quantizer(x, with_codes=True) if needs_codes and isinstance(quantizer, Quantizer) else quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight of this optimizer step, under autocast in its dtype."""
        weight, quantizer = self.weight, self.weight_quantizer
        if quantizer is None:
            return weight
        if torch.compiler.is_compiling():
            return quantizer(weight)
        tensors = [weight, *_own_tensors(quantizer)]
        needs_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

        cached = self._cached
        if (
            cached is None
            or cached.source != _source(tensors, dtype, quantizer.training)
            or needs_graph > cached.has_graph
        ):
            # an inference tensor could not serve a later training step
            with torch.inference_mode(False), torch.set_grad_enabled(needs_graph), outside_checkpointing():
                quantized = quantizer(weight).to(dtype)
            if needs_graph:
                forget_after_backward(quantized, self, "_cached")
            elif torch.equal(quantized, weight):
                quantized = weight.detach()  # a finalized weight needs no second copy
            cached = CachedWeight(quantized, _source(tensors, dtype, quantizer.training), needs_graph)
            self._cached = cached
        return cached.tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cached = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


def _own_tensors(module: nn.Module) -> list[Tensor]:
    # parameters() and buffers() look for duplicates, which takes longer than all else in a cached call
    found = (tensor for each in module.modules() for tensor in (*each._parameters.values(), *each._buffers.values()))
    return [tensor for tensor in found if tensor is not None]


def _source(tensors: list[Tensor], dtype: torch.dtype, training: bool) -> tuple[object, ...]:
    return dtype, training, *((tensor.data_ptr(), tensor._version) for tensor in tensors)
