"""Keys and values of remembered frames, each computed once: all before the softmax is linear in memory and position.

A key is rotary(k_proj(memory + spatial position + temporal position)). Kept is rotary(k_proj(memory + spatial
position)); rotary(W_k temporal position), which no frame changes, is added when the key is read (ours). In a quantized
model the two parts are quantized apart: kept keys and values by the attention's own quantizers, as integers; the
temporal part at the same bits between its own minimum and maximum, which are known, as it is constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sam2.modeling.sam.transformer import RoPEAttention
from torch import Tensor, nn

from qsam2.layers.attention import RotaryTable, is_quantizing, quantizer_of, rotate, split_heads
from qsam2.layers.products import products_of
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer, build_quantizer
from qsam2.quantizers.step_cache import version_of
from qsam2.recipe.quantizer_specs import MinMaxSpec

CODES_A_BYTE = {2: 4, 3: 2, 4: 2}
"""By bits; from 5 bits on a code takes a byte."""


@dataclass(frozen=True)
class Stored:
    """Keys or values at rest: as they are, or as the codes of a quantizer, packed into bytes."""

    data: Tensor
    dtype: torch.dtype
    packed: bool

    @classmethod
    def of(cls, x: Tensor, quantizer: Quantizer | None) -> Stored:
        """Integers where `x` is quantized and no gradient is asked for."""
        if quantizer is None or torch.is_grad_enabled() or quantizer.training or not is_quantizing(quantizer):
            return cls(x if quantizer is None else quantizer(x), x.dtype, packed=False)
        return cls(pack_codes(quantizer.to_int(x) - quantizer.qmin, quantizer.bits), x.dtype, packed=True)

    def load(self, quantizer: Quantizer | None) -> Tensor:
        """Dequantized tensor, equal to what the quantizer returns for the stored one."""
        if not self.packed:
            return self.data
        assert quantizer is not None
        codes = unpack_codes(self.data, quantizer.bits).short() + quantizer.qmin
        return quantizer.dequantize(codes, self.dtype)


@dataclass(eq=False)
class FrameMemory:
    """A remembered frame of one object or a batch of them, with its keys and values by layer.

    Args:
        time: the frame's index in the video.
        slot: index of its temporal position: 0 for the latest frame, the last for conditioning frames.
        features: memory features (B, C, H, W).
        position: spatial position (1 or B, C, H, W).
    """

    time: int
    slot: int
    features: Tensor
    position: Tensor
    kept_keys: dict[int, Stored] = field(default_factory=dict)
    kept_values: dict[int, Stored] = field(default_factory=dict)
    salience: dict[int, Tensor] = field(default_factory=dict)
    """By layer, (B, H * W): the attention that each token received when it was first read."""
    similarity: tuple[Tensor, list[float]] | None = None
    """The next older frame's features, and how similar they are, an object each."""

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features and spatial position, each (1 or B, H * W, C)."""
        position = self.position.to(device).flatten(2).transpose(1, 2)
        features = self.features.to(device).flatten(2).transpose(1, 2)
        return features.to(torch.promote_types(features.dtype, position.dtype)), position

    def keys(self, layer: int, attention: RoPEAttention, table: RotaryTable) -> Tensor:
        """Rotated keys without temporal position, quantized: (B, heads, H * W, C / heads)."""
        quantizer = quantizer_of(attention, "k")
        if layer not in self.kept_keys:
            features, position = self.tokens(table[0].device)
            k = split_heads(attention.k_proj(features + position), attention.num_heads)
            self.kept_keys[layer] = Stored.of(rotate(k, *table), quantizer)
        return self.kept_keys[layer].load(quantizer)

    def values(self, layer: int, attention: RoPEAttention, device: torch.device) -> Tensor:
        """Quantized values: (B, heads, H * W, C / heads)."""
        quantizer = quantizer_of(attention, "v")
        if layer not in self.kept_values:
            features, _ = self.tokens(device)
            self.kept_values[layer] = Stored.of(split_heads(attention.v_proj(features), attention.num_heads), quantizer)
        return self.kept_values[layer].load(quantizer)


class TemporalKeys:
    """rotary(W_k temporal position) of all slots, kept while the weights stay as they are, or for a training clip.

    A write through `weight.data` goes unseen, as it does in autograd.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[object, Tensor]] = {}

    def __call__(
        self, layer: int, attention: RoPEAttention, positions: Tensor, table: RotaryTable, with_graph: dict[int, Tensor]
    ) -> Tensor:
        """Temporal keys from the model's parameter (slots, 1, 1, C): (slots, heads, H * W, C / heads).

        Where gradients are asked for, `with_graph` is what keeps them, by layer.
        """
        if torch.is_grad_enabled():
            if layer not in with_graph:
                with_graph[layer] = temporal_keys(attention, positions.flatten(1), table)
            return with_graph[layer]
        device = positions.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tensors = [positions, *attention.k_proj.parameters(), *attention.k_proj.buffers()]
        codes = [quantizer.state for quantizer in _part_quantizers(attention) if quantizer is not None]
        source = precision, len(table[0]), *codes, *((tensor.data_ptr(), version_of(tensor)) for tensor in tensors)
        kept = self._kept.get(layer)
        if kept is None or kept[0] != source:
            kept = self._kept[layer] = source, temporal_keys(attention, positions.flatten(1), table)
        return kept[1]


def temporal_keys(attention: RoPEAttention, positions: Tensor, table: RotaryTable) -> Tensor:
    """rotary(W_k positions), without the bias of k_proj: (slots, C) to (slots, heads, H * W, C / heads)."""
    projection: nn.Linear = attention.k_proj
    input_quantizer, k_quantizer = _part_quantizers(attention)
    weight = projection.quantized_weight() if isinstance(projection, QuantizedLayer) else projection.weight
    with products_of(projection):
        keys = F.linear(_quantized_apart(positions, input_quantizer), weight)
    keys = split_heads(keys.unsqueeze(1), attention.num_heads).expand(-1, -1, len(table[0]), -1)
    return _quantized_apart(rotate(keys, *table), k_quantizer)


def mixed(of_slots: Tensor, mixes: Sequence[Mapping[int, float]]) -> Tensor:
    """Weighted sums over slots: (slots, ...) and {slot: weight} an object to (B, ...), or (1, ...) if all are alike."""
    different = mixes if any(mix != mixes[0] for mix in mixes) else mixes[:1]
    sums = []
    for mix in different:
        (first, weight), *others = mix.items()
        total = of_slots[first] if weight == 1 else weight * of_slots[first]
        for slot, share in others:
            total = torch.add(total, of_slots[slot], alpha=share)
        sums.append(total)
    return sums[0].unsqueeze(0) if len(sums) == 1 else torch.stack(sums)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes 0..2^bits-1 (..., C) as uint8 (..., C / codes a byte); C is a multiple of 4."""
    parts = codes.to(torch.uint8).unflatten(-1, (-1, CODES_A_BYTE.get(bits, 1))).unbind(-1)
    packed = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        packed = packed | (part << index * (8 // len(parts)))
    return packed.contiguous()


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`, uint8."""
    count = CODES_A_BYTE.get(bits, 1)
    if count == 1:
        return packed
    width = 8 // count
    return torch.stack([(packed >> index * width) & (2**width - 1) for index in range(count)], dim=-1).flatten(-2)


def _part_quantizers(attention: RoPEAttention) -> tuple[Quantizer | None, Quantizer | None]:
    """Quantizers of the input of k_proj and of k."""
    return getattr(attention.k_proj, "input_quantizer", None), quantizer_of(attention, "k")


def _quantized_apart(x: Tensor, quantizer: Quantizer | None) -> Tensor:
    # The layer's own range is that of whole keys: at 4 bits its step would round these small parts away.
    if quantizer is None or not is_quantizing(quantizer):
        return x
    spec = MinMaxSpec(bits=quantizer.bits, symmetric=quantizer.grid.symmetric)
    own = build_quantizer(spec, "activation", name=f"{quantizer.name}.temporal").to(x.device).eval()
    own.initialize_from(x)
    return own(x)
