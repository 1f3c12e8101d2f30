"""A quantized or float model's layers as plain ones: nothing is fake-quantized while it runs (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.layers.attention import (
    QuantAttention,
    QuantizedAttention,
    QuantMultiScaleAttention,
    QuantRoPEAttention,
    attend,
)
from qsam2.layers.convert import QUANT_ATTENTIONS, QUANT_LAYERS
from qsam2.layers.weight import QuantizedLayer, recast

PLAIN_TYPES = {twin: plain for plain, twin in QUANT_LAYERS.items()}


class FastMultiScaleAttention(QuantMultiScaleAttention):
    """Hiera's attention by `attend`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        return attend(q, k, v)


class FastAttention(QuantAttention):
    """The mask decoder's attention by `attend`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        return attend(q, k, v)


class FastRoPEAttention(QuantRoPEAttention):
    """The memory attention's by `attend`; rotary encoding in real numbers, which takes fewer copies."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        return attend(q, k, v)


FAST_ATTENTIONS: dict[type[nn.Module], type[QuantizedAttention]] = {
    QuantMultiScaleAttention: FastMultiScaleAttention,
    QuantAttention: FastAttention,
    QuantRoPEAttention: FastRoPEAttention,
}


@torch.no_grad()
def use_plain_layers(model: nn.Module) -> None:
    """Replace quantized layers by plain ones with the dequantized weights, attentions by fast ones, in place.

    Activations are not quantized any more. Raises UserError where a quantizer has no range yet.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLayer):
            model.set_submodule(name, _plain(module))
        elif isinstance(module, QuantizedAttention) or type(module) in QUANT_ATTENTIONS:
            model.set_submodule(name, _fast_attention(module))


def _plain(layer: QuantizedLayer) -> nn.Module:
    plain: Any = recast(PLAIN_TYPES[type(layer)], layer)
    quantizer = layer.weight_quantizer
    if quantizer is not None:
        values = quantizer.dequantize(quantizer.to_int(layer.weight), layer.weight.dtype)
        plain._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    for name in ("weight_quantizer", "input_quantizer"):
        plain._modules.pop(name, None)
        plain.__dict__.pop(name, None)
    del plain.__dict__["_cached"]
    return plain


def _fast_attention(attention: nn.Module) -> nn.Module:
    if not isinstance(attention, QuantizedAttention):
        attention = QUANT_ATTENTIONS[type(attention)].from_float(attention)
    fast = recast(FAST_ATTENTIONS[type(attention)], attention)
    for part in "qkv":
        fast._modules.pop(f"{part}_quantizer", None)
        setattr(fast, f"{part}_quantizer", None)
    return fast
