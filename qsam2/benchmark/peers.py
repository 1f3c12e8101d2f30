"""The others: plain PyTorch, ATen's operation, Brevitas and torchao, all with the ranges that we calibrated."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.quantizers import Quantizer
from qsam2.recipe.section import did_you_mean

FakeQuantize = Callable[[Tensor], Tensor]
INSTALL = 'pip install -e ".[peers]"'


class Peer:
    """Another implementation of a linear layer with quantized weight and input."""

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    """What has to be installed."""
    note: ClassVar[str]
    """How it quantizes, and what of our setting it cannot express."""

    def linear(self, layer: nn.Linear, weight: Quantizer, input: Quantizer) -> nn.Module:
        """The quantized twin of a float layer, with the calibrated ranges of our quantizers.

        The weight's are symmetric per channel, scale (out_features,) and codes -2^(bits-1)..2^(bits-1)-1; the input's
        affine per tensor, scale and zero point (1,) and codes 0..2^bits-1.
        """
        raise NotImplementedError

    def quantizers(self, twin: Any) -> tuple[FakeQuantize, FakeQuantize]:
        """Fake quantizers of a layer's weight and input."""
        return twin.weight_quantizer, twin.input_quantizer


class StraightThroughLSQ(nn.Module):
    """LSQ as it is commonly written: round, clamp, straight-through by detach (pseudocode of arXiv 1902.08153)."""

    def __init__(self, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, learn_zero_point: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.clone())
        self.zero_point = nn.Parameter(zero_point.clone(), requires_grad=learn_zero_point)
        self.qmin, self.qmax = qmin, qmax

    def gradient_factor(self, x: Tensor) -> float:
        """LSQ's 1/sqrt(N Qp), N the elements that share a step."""
        return 1.0 / math.sqrt(x.numel() / self.scale.numel() * self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        factor, rows = self.gradient_factor(x), (-1, *(1,) * (x.ndim - 1))
        scale = (self.scale * factor + (self.scale * (1 - factor)).detach()).view(rows)
        zero_point = self.zero_point.view(rows)
        codes = (x / scale + zero_point).clamp(self.qmin, self.qmax)
        codes = codes + (codes.round() - codes).detach()
        return (codes - zero_point) * scale


class LearnableATen(StraightThroughLSQ):
    """`torch._fake_quantize_learnable_per_*_affine`, the operation behind PyTorch's learnable fake quantization."""

    def forward(self, x: Tensor) -> Tensor:
        limits = self.qmin, self.qmax, self.gradient_factor(x)
        if self.scale.numel() == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero_point, *limits)
        return torch._fake_quantize_learnable_per_channel_affine(x, self.scale, self.zero_point, 0, *limits)


class FakeQuantLinear(nn.Linear):
    """A linear layer with modules that fake-quantize its weight and input at each call; it shares the float weight."""

    def __init__(self, layer: nn.Linear, weight_quantizer: nn.Module, input_quantizer: nn.Module) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class PlainLSQ(Peer):
    name = "plain_lsq"
    note = "learned steps, the input's zero point fixed; the weight is quantized at each call"
    step: ClassVar = StraightThroughLSQ
    learns_zero_point = False

    def linear(self, layer: nn.Linear, weight: Quantizer, input: Quantizer) -> nn.Module:
        half, last = 2 ** (weight.bits - 1), 2**input.bits - 1
        return FakeQuantLinear(
            layer,
            self.step(weight.scale, torch.zeros_like(weight.scale), -half, half - 1, False),
            self.step(input.scale, input.zero_point, 0, last, self.learns_zero_point),
        )


class ATen(PlainLSQ):
    name = "aten"
    note = "learned steps, the input's zero point learned too; the weight is quantized at each call"
    step = LearnableATen
    learns_zero_point = True


class Brevitas(Peer):
    name = "brevitas"
    modules = ("brevitas.nn", "brevitas.quant.scaled_int", "brevitas.quant.shifted_scaled_int")
    note = "QuantLinear: learned scales, the input's zero point learned too; the weight is quantized at each call"

    def linear(self, layer: nn.Linear, weight: Quantizer, input: Quantizer) -> nn.Module:
        from brevitas.nn import QuantLinear
        from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
        from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat

        twin = QuantLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=weight.bits,
            weight_narrow_range=False,
            weight_scaling_impl_type="parameter_from_stats",
            input_quant=ShiftedUint8ActPerTensorFloat,
            input_bit_width=input.bits,
            input_collect_stats_steps=1,
        )
        # It learns thresholds, which are scale times a number of steps, and scale times zero point
        weights = twin.weight_quant.tensor_quant
        inputs = twin.input_quant.fused_activation_quant_proxy.tensor_quant
        with torch.no_grad():
            twin.weight.copy_(layer.weight)
            if layer.bias is not None:
                twin.bias.copy_(layer.bias)
            weights.scaling_impl.value.copy_(weight.scale.view(-1, 1) * 2 ** (weight.bits - 1))
            inputs.scaling_impl.value.copy_(input.scale.squeeze() * (2**input.bits - 1))
            inputs.zero_point_impl.value.copy_((input.scale * input.zero_point).squeeze())
        weights.scaling_impl.init_done = True
        for learned in (inputs.scaling_impl, inputs.zero_point_impl):
            learned.counter = learned.collect_stats_steps + 1  # past the steps that collect statistics
        return twin

    def quantizers(self, twin: Any) -> tuple[FakeQuantize, FakeQuantize]:
        return lambda weight: twin.weight_quant(weight).value, lambda x: twin.input_quant(x).value


class TorchAO(Peer):
    name = "torchao"
    modules = ("torchao.quantization.qat",)
    note = (
        "FakeQuantizedLinear (it has no convolution): learned weight scales, quantized at each call; cannot learn the "
        "range of an input of any shape or quantize it per tensor: it takes the minimum and maximum of each token"
    )

    def linear(self, layer: nn.Linear, weight: Quantizer, input: Quantizer) -> nn.Module:
        from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

        dtype = getattr(torch, f"int{weight.bits}")
        weights = IntxFakeQuantizeConfig(dtype, "per_channel", is_dynamic=False, range_learning=True)
        inputs = IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False)
        twin = FakeQuantizedLinear.from_linear(layer, inputs, weights)
        scale = weight.scale.view(-1, 1).clone()
        quantizer = twin.weight_fake_quantizer
        quantizer.scale, quantizer.zero_point = nn.Parameter(scale), torch.zeros_like(scale)
        return twin

    def quantizers(self, twin: Any) -> tuple[FakeQuantize, FakeQuantize]:
        return twin.weight_fake_quantizer, twin.activation_fake_quantizer


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (PlainLSQ, ATen, Brevitas, TorchAO)}


def choose_peers(names: Sequence[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers of these names, and why others of them are left out; raises UserError if there is no such peer."""
    chosen, left_out = [], {}
    for name in dict.fromkeys(names):
        if name not in PEERS:
            choice = f"choose from {', '.join(PEERS)}{did_you_mean(name, PEERS)}"
            raise UserError(f"--peers {name}: there is no such peer, {choice}")
        try:
            for module in PEERS[name].modules:
                importlib.import_module(module)
        except ImportError as error:
            left_out[name] = f"{error}; install it with: {INSTALL}"
        else:
            chosen.append(PEERS[name]())
    return chosen, left_out
