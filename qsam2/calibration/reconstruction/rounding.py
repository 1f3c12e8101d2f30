"""Soft rounding of weights (AdaRound: Nagel et al., arXiv 2004.10568, eq. 21-25; BRECQ uses it by block)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsam2.quantizers import Quantizer
from qsam2.quantizers.fake_quant import broadcast_shape

STRETCH, SHIFT = 1.2, 0.1
"""The rectified sigmoid's: h reaches 0 and 1 at finite V."""
SMALLEST = 1e-20
FIRST_BETA, LAST_BETA = 20.0, 2.0


class SoftRounding(nn.Module):
    """In a frozen weight quantizer's place while a block is fitted: W^ = s * clip(floor(W/s) + h(V); low, high).

    `v` has the weight's shape; at first W^ is W, clipped. On a mid-rise grid levels are odd multiples of half a step.
    """

    floor: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        shape = broadcast_shape(quantizer.num_channels, weight.ndim, quantizer.channel_dim)
        scale, zero_point = quantizer.scale.view(shape), quantizer.zero_point.view(shape)
        offset = 0.5 if quantizer.grid.mid_rise else 0.0
        steps = weight.detach() / scale
        floor = (steps - offset).floor() + offset
        self.v = nn.Parameter(torch.logit((steps - floor + SHIFT) / STRETCH))
        self.register_buffer("floor", floor)
        self.register_buffer("scale", scale)
        self.register_buffer("low", quantizer.qmin - zero_point)
        self.register_buffer("high", quantizer.qmax - zero_point)

    @property
    def h(self) -> Tensor:
        """How much of a step each weight is rounded up, 0 to 1."""
        return (STRETCH * self.v.sigmoid() - SHIFT).clamp(0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight; `weight` itself plays no part any more."""
        return (torch.clamp(self.floor + self.h, self.low, self.high) * self.scale).to(weight.dtype)

    @torch.no_grad()
    def hard(self, dtype: torch.dtype) -> Tensor:
        """The weight as its own dequantized integers: up where h is a half or more."""
        levels = torch.clamp(self.floor + (self.h >= 0.5), self.low, self.high)
        return self.quantizer.dequantize((levels + self.quantizer.qmin - self.low).round(), dtype)

    def regularization(self, beta: float) -> Tensor:
        """Sum of 1 - |2h - 1|^beta over a channel's weights, mean over channels (the papers: sum over all).

        With errors relative to the variance of the output, which average over its channels, the balance is theirs.
        """
        decided = (2.0 * self.h - 1.0).abs().clamp(min=SMALLEST)
        power = (decided.log2() * beta).exp2()  # several times as fast as pow
        return (1.0 - power).sum() / self.v.shape[self.quantizer.channel_dim]


def beta_at(progress: float, warmup: float) -> float | None:
    """The exponent at a share of the iterations: from 20 down to 2, linearly; None during warm-up."""
    if progress < warmup:
        return None
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1.0 - (progress - warmup) / (1.0 - warmup))
