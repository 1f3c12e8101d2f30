"""A block between its two states: soft while it is fitted, hard before and after."""

from __future__ import annotations

import torch
from torch import nn

from qsam2.calibration.reconstruction.rounding import SoftRounding
from qsam2.calibration.reconstruction.steps import LearnedStep
from qsam2.layers.convert import quantized_weights
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer


@torch.no_grad()
def soften_weights(block: nn.Module) -> None:
    """Give all quantized weights of a calibrated block soft rounding; their scales and zero points are frozen."""
    for _, layer, quantizer in list(quantized_weights(block)):
        quantizer.freeze(layer.weight)
        layer.weight_quantizer = SoftRounding(layer.weight, quantizer)  # type: ignore[assignment]


@torch.no_grad()
def learn_steps(block: nn.Module, drop: float = 0.0) -> None:
    """Give all quantized activations of a calibrated block learned steps, the quantizers frozen behind them."""
    for parent in list(block.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, Quantizer) and child.role == "activation":
                child.freeze()
                setattr(parent, key, LearnedStep(child, drop))


@torch.no_grad()
def harden(block: nn.Module) -> None:
    """Round every soft weight of a block for good and put all quantizers, FROZEN, back in their places."""
    for layer in list(block.modules()):
        for key, child in list(layer.named_children()):
            if isinstance(child, LearnedStep):
                setattr(layer, key, child.store())
            elif isinstance(child, SoftRounding) and isinstance(layer, QuantizedLayer):
                layer.weight.copy_(child.hard(layer.weight.dtype))
                layer.weight_quantizer = child.quantizer


@torch.no_grad()
def flipped_share(block: nn.Module) -> float:
    """Share of a soft block's weights that `harden` will not round to the nearest."""
    flipped, total = 0, 0
    for layer in block.modules():
        rounding = getattr(layer, "weight_quantizer", None)
        if isinstance(rounding, SoftRounding):
            moved = rounding.hard(torch.float32) - rounding.quantizer(layer.weight)
            flipped += int((moved.abs() > rounding.scale / 2).sum())
            total += moved.numel()
    return flipped / max(total, 1)


def soft_roundings(block: nn.Module) -> list[SoftRounding]:
    """All of a block."""
    return [module for module in block.modules() if isinstance(module, SoftRounding)]


def learned_steps(block: nn.Module) -> list[LearnedStep]:
    """All of a block."""
    return [module for module in block.modules() if isinstance(module, LearnedStep)]
