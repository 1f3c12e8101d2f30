"""The quantized linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.layers.weight import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """Q(x) Q(W)^T + b, the bias in float."""

    channel_dim = 0

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
