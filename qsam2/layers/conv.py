"""The quantized convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.layers.weight import QuantizedLayer


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
        return F.conv_transpose2d(
            self.quantized_input(input),
            self.quantized_weight(),
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )
