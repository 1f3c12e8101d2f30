"""Quantization grids in ONNX: QuantizeLinear and DequantizeLinear with the model's scales, zero points and integers.

Modules that call two custom operations replace the quantizers of a finalized model; the exporter translates the
operations. Nothing is measured or rounded again. ONNX has integers of 4 and 8 bits (opset 21); other widths from 2 to 8
bits are expressed exactly:
  activation of 2, 3, 5, 6, 7 bits   clipped to the outer levels of the grid, then the next wider integer
  activation on a mid-rise grid      Div, Round, Clip and Mul: no integer type has a zero point between two codes
  weight of 2, 3, 5, 6, 7 bits       the next wider integer
  weight on a mid-rise grid          scale * (code + 1/2) = scale/2 * (2 code + 1): 4-bit integers to 3 bits, 8-bit
                                     ones to 7, 16-bit ones at 8
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.layers.convert import quantized_weights, quantizers
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer
from qsam2.quantizers.passes import to_levels

FOUR_BITS = "codes_4bit"
"""Name of the codes that `narrow` stores as 4-bit integers, which PyTorch lacks."""


@torch.library.custom_op("qsam2::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """x of any shape on the grid scale * (qmin - zero_point .. qmax - zero_point)."""
    step, low, high = (x.new_tensor([value]) for value in (scale, qmin - zero_point, qmax - zero_point))
    return to_levels(x, step, low, high, mid_rise=False).mul_(step)


@torch.library.custom_op("qsam2::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """scale * (codes - zero_point), scale and zero point (C,) along `axis`, the zero point of the codes' dtype."""
    shape = [-1 if dim == axis else 1 for dim in range(codes.ndim)]
    values = codes.float()
    if zero_point is not None:
        values -= zero_point.float().view(shape)
    return values * scale.view(shape)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


class ActivationGrid(nn.Module):
    """Replaces the quantizer of an activation."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.scale, self.zero_point = quantizer.scale.item(), quantizer.zero_point.item()
        self.qmin, self.qmax, self.mid_rise = quantizer.qmin, quantizer.qmax, quantizer.grid.mid_rise

    def forward(self, x: Tensor) -> Tensor:
        if self.mid_rise:
            levels = (x / self.scale - 0.5).round() + 0.5
            return levels.clamp(self.qmin - self.zero_point, self.qmax - self.zero_point) * self.scale
        return torch.ops.qsam2.quantize_dequantize(x, self.scale, int(self.zero_point), self.qmin, self.qmax)


class WeightCodes(nn.Module):
    """Replaces the quantizer of a weight: returns the stored integers, dequantized; its input is ignored."""

    def __init__(self, quantizer: Quantizer, layer: QuantizedLayer) -> None:
        super().__init__()
        self.axis, channels = layer.channel_dim, layer.weight.shape[layer.channel_dim]
        codes, bits = quantizer.to_int(layer.weight.detach()), quantizer.bits
        scale = quantizer.scale.expand(channels).clone()
        zero_point = None
        if quantizer.grid.mid_rise:
            codes, scale, bits = 2 * codes + 1, scale / 2, bits + 1
        elif not quantizer.grid.symmetric:
            zero_point = quantizer.zero_point.expand(channels).to(torch.uint8)
        dtype = torch.int16 if bits > 8 else torch.int8 if quantizer.grid.symmetric else torch.uint8
        self.codes_name = FOUR_BITS if bits <= 4 else "codes"
        self.register_buffer(self.codes_name, codes.to(dtype))
        self.scale = nn.Buffer(scale)
        self.zero_point = None if zero_point is None else nn.Buffer(zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.ops.qsam2.dequantize(getattr(self, self.codes_name), self.scale, self.zero_point, self.axis)


@torch.no_grad()
def use_onnx_grids(model: nn.Module) -> None:
    """Replace the quantizers of a finalized model, in place."""
    weights = {id(quantizer): layer for _, layer, quantizer in quantized_weights(model)}
    for name, quantizer in list(quantizers(model)):
        layer = weights.get(id(quantizer))
        model.set_submodule(name, ActivationGrid(quantizer) if layer is None else WeightCodes(quantizer, layer))


def translations() -> dict[Any, Any]:
    """Exporter translations of the two custom operations; needs onnxscript."""
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir
    import onnxscript
    from onnxscript import FLOAT

    op: Any = onnxscript.opset21

    def quantize_dequantize_onnx(x: FLOAT, scale: float, zero_point: int, qmin: int, qmax: int) -> FLOAT:
        step, levels = np.float32(scale), qmax - qmin + 1
        four, eight = (ml_dtypes.int4, np.int8) if qmin < 0 else (ml_dtypes.uint4, np.uint8)
        if levels not in (2**4, 2**8):
            outer = [np.float32(level - zero_point) * step for level in (qmin, qmax)]
            x = op.Clip(x, *(op.Constant(value=ir.tensor(value)) for value in outer))
        scale_onnx = op.Constant(value=ir.tensor(step))
        zero_point_onnx = op.Constant(value=ir.Tensor(np.array(zero_point, four if levels <= 2**4 else eight)))
        return op.DequantizeLinear(op.QuantizeLinear(x, scale_onnx, zero_point_onnx), scale_onnx, zero_point_onnx)

    def dequantize_onnx(codes, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    return {
        torch.ops.qsam2.quantize_dequantize.default: quantize_dequantize_onnx,
        torch.ops.qsam2.dequantize.default: dequantize_onnx,
    }


def narrow(model: Any) -> None:
    """Store the codes named `FOUR_BITS` of an onnx_ir model as INT4 or UINT4, with their zero points."""
    import ml_dtypes
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type != "DequantizeLinear" or not node.inputs[0].name.endswith(FOUR_BITS):
            continue
        for index in (0, 2):
            if index >= len(node.inputs) or node.inputs[index] is None:
                continue
            value = node.inputs[index]
            integers = value.const_value.numpy()
            four = ml_dtypes.int4 if integers.dtype.kind == "i" else ml_dtypes.uint4
            name = f"{node.inputs[0].name}.{index}"
            tensor = ir.Tensor(integers.astype(four), name=name)
            narrowed = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=value.shape, const_value=tensor)
            model.graph.initializers[name] = narrowed
            node.replace_input_with(index, narrowed)
            if not value.uses():
                del model.graph.initializers[value.name]
