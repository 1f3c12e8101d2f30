"""Linear layers that compute with a quantized model's own integers, where the processor multiplies bytes (ours).

PyTorch's oneDNN operators, which its compiler uses as well, do the products; they are no public interface: where they
are absent a layer stays as it is. Measured: docs/speed.md.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from sam2.modeling.memory_attention import MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock
from sam2.modeling.sam2_utils import MLP
from torch import Tensor, nn

from qsam2.layers.weight import QuantLinear
from qsam2.quantizers import Quantizer, QuantizerState

LAYERS = ("image_encoder.*", "memory_attention.layers.*.linear?", "memory_encoder.*")
"""Not the memory attention's projections, whose weights the cache of keys takes apart."""
LARGEST_CODE = 255
UNCHANGED = nn.Identity()


def multiplies_bytes(device: torch.device) -> bool:
    """True if integers are faster than floats: a CPU with VNNI, and a PyTorch with the operators.

    Without VNNI sums of two products saturate at 16 bits, and are slower than floats besides.
    """
    there = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch.ops.onednn, "qlinear_prepack")
    return device.type == "cpu" and there and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


class IntegerLinear(nn.Module):
    """A quantized linear layer, its input rounded to the layer's grid: s_x s_w (q_x - z_x) q_w^T + b, in `dtype`.

    (..., in_features), floats or what the layer before has rounded already (uint8), to (..., out_features).
    """

    def __init__(self, layer: QuantLinear, dtype: torch.dtype) -> None:
        super().__init__()
        assert layer.input_quantizer is not None and layer.weight_quantizer is not None
        self.dtype = dtype
        self.bias = layer.bias
        self.out_features = layer.out_features
        read = layer.input_quantizer
        self.mid_rise = read.grid.mid_rise
        parts = 2 if self.mid_rise else 1  # in half steps a zero point between two codes is an integer
        self.steps_per_unit = 1 / float(read.scale)
        self.input_scale = float(read.scale) / parts
        self.zero_point = int(parts * (float(read.zero_point) - read.qmin))
        self.largest = parts * (read.qmax - read.qmin)
        codes, scale = _integers(layer.weight_quantizer, layer.weight)
        self.weight = torch.ops.onednn.qlinear_prepack(codes, None)
        self.weight_scale = scale
        self.weight_zero_point = torch.zeros(len(scale), dtype=torch.int64)
        self.activation = "none"
        self.output_grid: tuple[float, int, int] | None = None
        """Scale, zero point and largest code of the layer that reads the output, if that is handed over as codes."""

    def feed(self, reader: IntegerLinear, activation: str) -> None:
        """From now on `activation` ("gelu", exact, or "relu") is applied, and what `reader` reads comes out, uint8."""
        self.output_grid = reader.input_scale, reader.zero_point, reader.largest
        self.activation = activation

    def codes(self, x: Tensor) -> Tensor:
        """The codes of this layer's input, uint8 of x's shape."""
        levels = x.float().mul(self.steps_per_unit)
        if self.mid_rise:
            levels.sub_(0.5).round_().mul_(2.0).add_(1.0)
        else:
            levels.round_()
        return levels.add_(self.zero_point).clamp_(0, self.largest).to(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        codes = x if x.dtype == torch.uint8 else self.codes(x)
        scale, zero_point, largest = self.output_grid or (1.0, 0, LARGEST_CODE)
        out = torch.ops.onednn.qlinear_pointwise(
            codes.reshape(-1, codes.shape[-1]),
            self.input_scale,
            self.zero_point,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            scale,
            zero_point,
            torch.uint8 if self.output_grid else self.dtype,
            self.activation,
            [],
            "none",
        )
        if largest < LARGEST_CODE:
            out.clamp_(max=largest)
        return out.view(*x.shape[:-1], self.out_features)


def use_integers(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the linear layers of image encoder and memory that have what it takes by `IntegerLinear`, in place.

    That is a weight and an input with grids of integers, the input's one for the whole tensor. Two that follow one
    another, with nothing but a GELU or ReLU between them, hand over integers, unless the second reads a mid-rise grid.

    Returns how many there are.
    """
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        and any(fnmatchcase(name, pattern) for pattern in LAYERS)
        and _has_integers(module)
    }
    for name, module in chosen.items():
        model.set_submodule(name, IntegerLinear(module, dtype))
    for owner in model.modules():
        if isinstance(owner, MLP) and not owner.sigmoid_output:
            _join(owner, [*owner.get_submodule("layers").children()], "act")
        elif isinstance(owner, MemoryAttentionLayer):
            _join(owner, [owner.linear1, owner.linear2], "activation")
        elif isinstance(owner, CXBlock):
            _join(owner, [owner.pwconv1, owner.pwconv2], "act")
    return len(chosen)


def _join(owner: Any, layers: list[nn.Module], name: str) -> None:
    """Layers of `owner` between which stands its activation of that name."""
    found = getattr(owner, name)
    kind = getattr(found, "__name__", type(found).__name__).lower()
    exact = getattr(found, "approximate", "none") == "none"
    joined = [layer for layer in layers if isinstance(layer, IntegerLinear)]
    rounds_to_codes = not any(layer.mid_rise for layer in joined[1:])  # all that the operator does on its way out
    if kind not in ("gelu", "relu") or not exact or len(joined) < len(layers) or not rounds_to_codes:
        return
    for layer, reader in zip(joined, joined[1:], strict=False):
        layer.feed(reader, kind)
    setattr(owner, name, UNCHANGED)


def _has_integers(layer: QuantLinear) -> bool:
    weight, read = layer.weight_quantizer, layer.input_quantizer
    if weight is None or read is None:
        return False
    quantizes = all(q.state in (QuantizerState.QUANTIZE, QuantizerState.FROZEN) for q in (weight, read))
    fits = all(quantizer.bits < 8 or not quantizer.grid.mid_rise for quantizer in (weight, read))
    return quantizes and fits and weight.grid.symmetric and not read.per_channel


def _integers(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (out, in) and scale (out,) float32 with weight = scale * code."""
    codes, scale = quantizer.to_int(weight), quantizer.scale.float()
    if quantizer.grid.mid_rise:  # odd multiples of half a step
        codes, scale = 2 * codes + 1, scale / 2
    return codes.to(torch.int8), scale.expand(len(codes)).contiguous()
