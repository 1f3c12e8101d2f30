"""Learned steps of activations while a block is fitted, and dropped quantization (QDrop: Wei et al., 2203.05740)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsam2.quantizers import Quantizer
from qsam2.quantizers.fake_quant import fake_quantize
from qsam2.quantizers.grid import positive


class LearnedStep(nn.Module):
    """In a frozen activation quantizer's place while a block is fitted, whatever its method (ours; gradient: LSQ).

    Learns log s; the zero point stays, so that the range scales about zero. With `drop`, each value is left in float
    with that probability (QDrop, eq. 11). It is no Quantizer: an audit refuses a model in which one is left.
    """

    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, drop: float = 0.0) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.drop = drop
        self.log_scale = nn.Parameter(quantizer.scale.log())
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x, some of it left as it is."""
        quantizer = self.quantizer
        quantized = fake_quantize(
            x,
            positive(self.log_scale),
            self.zero_point,
            quantizer.qmin,
            quantizer.qmax,
            channel_dim=quantizer.channel_dim,
            mid_rise=quantizer.grid.mid_rise,
            exact_gradient=False,
            num_samples=max(len(x), 1),
        )
        return torch.where(torch.rand_like(x) < self.drop, x, quantized) if self.drop else quantized

    @torch.no_grad()
    def store(self) -> Quantizer:
        """The quantizer, frozen with the learned step."""
        self.quantizer.frozen_scale.copy_(positive(self.log_scale))
        return self.quantizer
