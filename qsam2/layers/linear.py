"""The quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers.fake_quant import Codes, dequantize


class QuantLinear(QuantizedLayer, nn.Linear):
    """Q(x) Q(W)^T + b, the bias in float.

    For the gradient of W its input is saved as codes, a byte an element in place of four (ours).
    """

    channel_dim = 0
    reads_codes = True

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        codes = Codes.of(x)
        if codes is None:
            return F.linear(x, weight, self.bias)
        # a view that a Function returns could not be written to: sam2 turns queries and keys in place
        rows: Tensor = _LinearOfCodes.apply(x.reshape(-1, x.shape[-1]), weight, self.bias, *codes)
        return rows.view(*x.shape[:-1], self.out_features)


class _LinearOfCodes(torch.autograd.Function):
    """`F.linear` of x (N, in) that saves the codes (..., in) of x in place of x."""

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
            # as the forward pass had it: rounded to its dtype, then to autocast's
            x = dequantize(codes, scale, low, ctx.dtype).to(grad.dtype)
            grad_weight = (grad.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None
