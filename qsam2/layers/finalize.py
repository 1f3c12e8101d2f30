"""The end of training: quantizers are frozen, weights become what they are quantized to."""

from __future__ import annotations

import torch
from torch import nn

from qsam2.layers.convert import quantized_weights, quantizers
from qsam2.quantizers import QuantizerState


@torch.no_grad()
def finalize(model: nn.Module) -> None:
    """Freeze all quantizers and replace each quantized weight by its dequantized integers, in place (ours).

    Afterwards `weight == dequantize(to_int(weight))` exactly; a second call changes nothing.

    Raises:
        UserError: a quantizer has no range yet.
    """
    for _, layer, quantizer in quantized_weights(model):
        quantizer.freeze(layer.weight)
        layer.weight.copy_(quantizer.dequantize(quantizer.to_int(layer.weight), layer.weight.dtype))
    for _, quantizer in quantizers(model):
        if quantizer.state is not QuantizerState.FROZEN:
            quantizer.freeze()
