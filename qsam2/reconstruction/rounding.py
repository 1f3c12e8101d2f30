"""Learned rounding of weights and learned steps of activations, for the time a block is fitted.

Weights: AdaRound (Nagel et al., arXiv 2004.10568, eq. 21-25), W^ = s * clip(floor(W/s) + h(V); low, high), h a
rectified sigmoid that a regularizer drives to 0 or 1. Activations: log s is learned, with LSQ's gradient; QDrop (arXiv
2203.05740, eq. 11) leaves random values in float. `soften_weights` and `learn_steps` put both into a block, `harden`
removes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsam2.layers.convert import quantized_weights
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer
from qsam2.quantizers.fake_quant import broadcast_shape, fake_quantize
from qsam2.quantizers.grid import bounded_exp

STRETCH, SHIFT = 1.2, 0.1
"""Constants of the rectified sigmoid, so that h reaches 0 and 1 at finite V."""
SMALLEST = 1e-20
FIRST_BETA, LAST_BETA = 20.0, 2.0


class SoftRounding(nn.Module):
    """Replaces a frozen weight quantizer while a block is fitted.

    `v` has the weight's shape; W^ starts as W, clipped. On a mid-rise grid levels are odd multiples of half a step.
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
        """Fraction of a step, 0 to 1, by which each weight is rounded up."""
        return (STRETCH * self.v.sigmoid() - SHIFT).clamp(0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """Softly rounded weight; `weight` gives the dtype only."""
        return (torch.clamp(self.floor + self.h, self.low, self.high) * self.scale).to(weight.dtype)

    @torch.no_grad()
    def hard(self, dtype: torch.dtype) -> Tensor:
        """Hard-rounded weight, up where h >= 1/2: its own dequantized integers."""
        levels = torch.clamp(self.floor + (self.h >= 0.5), self.low, self.high)
        return self.quantizer.dequantize((levels + self.quantizer.qmin - self.low).round(), dtype)

    def regularization(self, beta: float) -> Tensor:
        """Sum of 1 - |2h - 1|^beta over a channel's weights, mean over channels (the papers: sum over all).

        Errors relative to the output's variance are means over channels, too, which keeps the papers' balance.
        """
        decided = (2.0 * self.h - 1.0).abs().clamp(min=SMALLEST)
        power = (decided.log2() * beta).exp2()  # several times as fast as pow
        return (1.0 - power).sum() / self.v.shape[self.quantizer.channel_dim]


def beta_at(progress: float, warmup: float) -> float | None:
    """Exponent at a share of the iterations: linear from 20 to 2; None during warm-up."""
    if progress < warmup:
        return None
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1.0 - (progress - warmup) / (1.0 - warmup))


class LearnedStep(nn.Module):
    """Replaces a frozen activation quantizer of any method while a block is fitted (ours).

    Learns log s; the zero point is fixed, so that the range scales about zero. `drop` is the probability of a value to
    stay in float (QDrop). It is no Quantizer, so that the audit refuses a model in which one remains.
    """

    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, drop: float = 0.0) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.drop = drop
        self.log_scale = nn.Parameter(quantizer.scale.log())
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x, except the dropped values."""
        quantizer = self.quantizer
        quantized = fake_quantize(
            x,
            bounded_exp(self.log_scale),
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
        self.quantizer.frozen_scale.copy_(bounded_exp(self.log_scale))
        return self.quantizer


@torch.no_grad()
def soften_weights(block: nn.Module) -> None:
    """Replace all weight quantizers of a calibrated block by soft rounding; scales and zero points are frozen."""
    for _, layer, quantizer in list(quantized_weights(block)):
        quantizer.freeze(layer.weight)
        layer.weight_quantizer = SoftRounding(layer.weight, quantizer)  # type: ignore[assignment]


@torch.no_grad()
def learn_steps(block: nn.Module, drop: float = 0.0) -> None:
    """Replace all activation quantizers of a calibrated block by learned steps; zero points are frozen."""
    for parent in list(block.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, Quantizer) and child.role == "activation":
                child.freeze()
                setattr(parent, key, LearnedStep(child, drop))


@torch.no_grad()
def harden(block: nn.Module) -> None:
    """Round every soft weight of a block and put all quantizers, FROZEN, back."""
    for layer in list(block.modules()):
        for key, child in list(layer.named_children()):
            if isinstance(child, LearnedStep):
                setattr(layer, key, child.store())
            elif isinstance(child, SoftRounding) and isinstance(layer, QuantizedLayer):
                layer.weight.copy_(child.hard(layer.weight.dtype))
                layer.weight_quantizer = child.quantizer


@torch.no_grad()
def flipped_share(block: nn.Module) -> float:
    """Share of a soft block's weights that `harden` will not round to the nearest level."""
    flipped, total = 0, 0
    for layer in block.modules():
        rounding = getattr(layer, "weight_quantizer", None)
        if isinstance(rounding, SoftRounding):
            moved = rounding.hard(torch.float32) - rounding.quantizer(layer.weight)
            flipped += int((moved.abs() > rounding.scale / 2).sum())
            total += moved.numel()
    return flipped / max(total, 1)


def soft_roundings(block: nn.Module) -> list[SoftRounding]:
    """All soft roundings of a block."""
    return [module for module in block.modules() if isinstance(module, SoftRounding)]


def learned_steps(block: nn.Module) -> list[LearnedStep]:
    """All learned steps of a block."""
    return [module for module in block.modules() if isinstance(module, LearnedStep)]
