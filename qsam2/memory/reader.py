"""A recipe's memory in a model: how remembered frames are read, and sam2's memory attention over sets of keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sam2.modeling.memory_attention import MemoryAttentionLayer
from sam2.modeling.sam.transformer import RoPEAttention
from torch import Tensor

from qsam2.errors import UserError
from qsam2.layers.attention import (
    RotaryTable,
    attend,
    join_heads,
    projects_values_last,
    quantize_part,
    rotary_table,
    rotate,
    split_heads,
)
from qsam2.layers.products import products_of
from qsam2.memory.bank import Bank, BoundedState, gather
from qsam2.memory.cache import FrameMemory, TemporalKeys, mixed
from qsam2.memory.sharing import KeySet, key_sets
from qsam2.recipe.recipe import MemoryRecipe

if TYPE_CHECKING:
    from qsam2.models import SAM2


def use_memory(model: SAM2, recipe: MemoryRecipe) -> None:
    """Let a model, float or quantized, training or tracking, keep and read its memory as the recipe says.

    Raises UserError if the recipe reads memory in another way, but the model has none.
    """
    if model.num_maskmem == 0 and recipe != MemoryRecipe():
        raise UserError("memory.*: this model has a memory of length 0 (num_maskmem=0): leave these keys out")
    model.memory_reader = MemoryReader(recipe) if recipe.reads_anew else None
    model.memory_bound = BoundedState(recipe.correctable) if recipe.bounded else None


class MemoryReader:
    """Replaces sam2's reading of the memory bank: reads key sets and object pointers with the model's memory attention.

    `watch`, where set, is told of each frame an object is tracked on: its number, the bank, what is read of it.
    """

    def __init__(self, recipe: MemoryRecipe) -> None:
        self.recipe = recipe
        self.watch: Callable[[int, Bank, list[KeySet]], None] | None = None
        self.temporal_keys = TemporalKeys()
        self._tables: dict[tuple[object, ...], RotaryTable] = {}
        self.keys = 0
        """Number of keys that the last frame read, per layer."""
        self.value_channels = 0
        """Channels of the values that its attention summed."""

    def condition(
        self,
        model: SAM2,
        features: Tensor,
        positions: Tensor,
        output_dict: dict[str, Any],
        *,
        frame_idx: int,
        num_frames: int,
        reverse: bool,
    ) -> Tensor:
        """A frame's features and positions (tokens, B, C) to features that know the memory, (tokens, B, C)."""
        bank = gather(model, output_dict, frame_idx=frame_idx, num_frames=num_frames, reverse=reverse)
        sets = key_sets(bank, self.recipe)
        if self.watch is not None:
            self.watch(frame_idx, bank, sets)
        attention, slots = model.memory_attention, model.maskmem_tpos_enc
        x, positions = (features + 0.1 * positions).transpose(0, 1), positions.transpose(0, 1)
        for index, layer in enumerate(attention.layers):
            with products_of(layer.self_attn):
                x = self._attend_itself(layer, x, positions)
            with products_of(layer.cross_attn_image):
                x = x + layer.dropout2(self._read(index, layer.cross_attn_image, layer.norm2(x), sets, bank, slots))
            x = x + layer.dropout3(layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm3(x))))))
        return attention.norm(x).transpose(0, 1)

    def _attend_itself(self, layer: MemoryAttentionLayer, x: Tensor, positions: Tensor) -> Tensor:
        attention = layer.self_attn
        if type(attention) is not RoPEAttention or x.device.type != "cpu" or attention.training:
            return layer._forward_sa(x, positions)
        normed = layer.norm1(x)
        placed = normed + positions if layer.pos_enc_at_attn else normed
        table = self._table(attention, x.shape[1])
        q, k = (
            rotate(split_heads(p(placed), attention.num_heads), *table) for p in (attention.q_proj, attention.k_proj)
        )
        out = attend(q, k, split_heads(attention.v_proj(normed), attention.num_heads))
        return x + attention.out_proj(join_heads(out))

    def _read(
        self, layer: int, attention: RoPEAttention, x: Tensor, sets: Sequence[KeySet], bank: Bank, slots: Tensor
    ) -> Tensor:
        """Cross-attention of x (B, tokens, C); all keys of a set are raised by the log of what they stand for."""
        table = self._table(attention, x.shape[1])
        q = quantize_part(rotate(split_heads(attention.q_proj(x), attention.num_heads), *table), attention, "q")
        keys, values, stands = [], [], []
        for each in sets:
            k = self._keys(layer, attention, each, slots, table, bank)
            v = self._values(layer, attention, each, table)
            if each.share is not None:
                k, v = _most_attended(layer, each.frames[0], each.share, q, k, v)
            elif each.window != (1, 1):
                k, v = (_averaged(part, each) for part in (k, v))
            keys.append(k)
            values.append(v)
            stands.append((k.shape[2], [count * math.prod(each.window) for count in each.counts]))
        if bank.pointers is not None:
            assert bank.pointer_positions is not None
            k = split_heads(attention.k_proj(bank.pointers + bank.pointer_positions), attention.num_heads)
            keys.append(quantize_part(k, attention, "k"))
            values.append(_as_values(attention, bank.pointers))
            stands.append((k.shape[2], [1] * len(x)))
        k, v = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self.keys, self.value_channels = k.shape[2], v.shape[3]
        out = attend(q, k, v, _raised(stands, q), attention.dropout_p if attention.training else 0.0)
        if projects_values_last(attention):
            out = attention.v_proj(out)
        return attention.out_proj(join_heads(out))

    def _keys(
        self, layer: int, attention: RoPEAttention, each: KeySet, slots: Tensor, table: RotaryTable, bank: Bank
    ) -> Tensor:
        """(B, heads, tokens, C / heads), temporal positions included."""
        if not self.recipe.cache:  # as sam2: the temporal position is added before the projection
            tokens = [frame.tokens(table[0].device) for frame in each.frames]
            features, position = _weighted([values for values, _ in tokens], each.weights), tokens[-1][1]
            temporal = mixed(slots.flatten(1), each.positions).unsqueeze(1)
            k = split_heads(attention.k_proj(features + position + temporal), attention.num_heads)
            return quantize_part(rotate(k, *table), attention, "k")
        temporal = self.temporal_keys(layer, attention, slots, table, bank.remembered.temporal_keys)
        keys = _weighted([frame.keys(layer, attention, table) for frame in each.frames], each.weights)
        return keys + mixed(temporal, each.positions)

    def _values(self, layer: int, attention: RoPEAttention, each: KeySet, table: RotaryTable) -> Tensor:
        """(B, heads, tokens, C / heads), or the memory itself, (B, 1, tokens, C_memory)."""
        device = table[0].device
        if self.recipe.cache and not projects_values_last(attention):
            return _weighted([frame.values(layer, attention, device) for frame in each.frames], each.weights)
        features = _weighted([frame.tokens(device)[0] for frame in each.frames], each.weights)
        return _as_values(attention, features)

    def _table(self, attention: RoPEAttention, tokens: int) -> RotaryTable:
        weight = attention.k_proj.weight
        known = tokens, attention.internal_dim, attention.num_heads, weight.device
        if known not in self._tables:
            with torch.inference_mode(False):  # it may serve training, too
                self._tables[known] = rotary_table(attention, tokens)
        return self._tables[known]


def _as_values(attention: RoPEAttention, memory: Tensor) -> Tensor:
    """Quantized values of memory (B, tokens, C_memory), or the memory itself if it is projected afterwards."""
    if projects_values_last(attention):
        return memory.unsqueeze(1)
    return quantize_part(split_heads(attention.v_proj(memory), attention.num_heads), attention, "v")


def _raised(stands: Sequence[tuple[int, Sequence[int]]], q: Tensor) -> Tensor | None:
    """(B, 1, 1, keys): the log of how many keys each stands for; None where all stand for themselves."""
    if all(number == 1 for _, numbers in stands for number in numbers):
        return None
    # One row for all queries: measured on the CPU this costs nothing; a channel of the keys for it up to 4 % in bf16.
    logs = torch.tensor([numbers for _, numbers in stands], dtype=q.dtype, device=q.device).log()  # (sets, B)
    lengths = torch.tensor([length for length, _ in stands], device=q.device)
    return logs.repeat_interleave(lengths, dim=0).T[:, None, None]


def _weighted(parts: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """The average of tensors (B, ...) by weights (parts, B); None for a single one."""
    if weights is None:
        return parts[0]
    shape = (-1, *[1] * (parts[0].ndim - 1))
    shares = [weight.to(parts[0].device).view(shape) for weight in weights]
    # In float32: three thirds of bfloat16 are 1.002.
    total = shares[0] * parts[0]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        total = torch.addcmul(total, share, part)
    return total.to(parts[0].dtype)


def _averaged(x: Tensor, each: KeySet) -> Tensor:
    """(B, heads, H * W, C) averaged over the set's windows."""
    height, width = each.frames[0].features.shape[-2:]
    rows, columns = each.window
    windows = x.unflatten(2, (height // rows, rows, width // columns, columns))
    return windows.mean(dim=(3, 5)).flatten(2, 3)


def _most_attended(
    layer: int, frame: FrameMemory, share: float, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of a frame's tokens that were most attended when it was first read; that first time all of them."""
    salience = frame.salience
    if layer not in salience:
        with torch.no_grad():
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            salience[layer] = scores.softmax(dim=-1).mean(dim=(1, 2))  # (B, tokens)
        return k, v
    count = max(round(share * k.shape[2]), 1)
    chosen = salience[layer].topk(count, dim=1).indices[:, None, :, None]
    return k.take_along_dim(chosen, dim=2), v.take_along_dim(chosen, dim=2)
