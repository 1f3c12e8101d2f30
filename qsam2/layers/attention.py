"""SAM2's three attention classes with quantized q, k and v.

Fused attention runs on the quantized tensors (ours): quantizing the score matrix would materialise it, 471 MB per
object and layer in the memory attention at 1024 px. Rotary encoding is real-valued, so that the model can be exported.
`attend` is the one attention for inference that reads memory; on a CPU it has a path of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import MultiScaleAttention, do_pool
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import Tensor, nn

from qsam2.layers.products import is_watched
from qsam2.layers.weight import recast
from qsam2.quantizers import Quantizer, QuantizerState

QUERIES = 1024
"""Queries whose scores are computed at a time: 118 MB of scores for a full bank at 1024 px in float32."""
ROW = 64
"""Row lengths of scores are multiples of it: products into unaligned rows take half as long again."""
RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines (tokens, channels / 2)."""


def axial_rotary_table(dim: int, width: int, height: int, theta: float) -> RotaryTable:
    """Cosines and sines, each (width * height, dim / 2) float32: half of the channels encode x, the others y.

    Axial rotary encoding of Heo et al. (arXiv 2403.13298), with SAM2's frequencies.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 4)[: dim // 4].float() / dim)
    positions = torch.arange(width * height)
    columns, rows = positions % width, positions // width
    angles = torch.cat([torch.outer(axis.float(), frequencies) for axis in (columns, rows)], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding of x (B, heads, r * N, C) by a table of N positions (N, C / 2), repeated r times, in float32.

    Channels (2i, 2i + 1) are a pair, rotated by the angle of its position: SAM2's complex product in real numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2)).unflatten(2, (-1, cos.shape[0]))  # (B, heads, r, N, C/2, 2)
    even, odd = pairs.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.reshape(x.shape).type_as(x)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, tokens, C) to (B, heads, tokens, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, tokens, C / heads) to (B, tokens, C)."""
    return x.transpose(1, 2).flatten(2)


class QuantizedAttention(nn.Module):
    """Base of the three attentions: a quantizer for each of q, k and v (None: not quantized), then fused attention."""

    q_quantizer: Quantizer | None
    k_quantizer: Quantizer | None
    v_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, attention: nn.Module, *quantizers: Quantizer | None) -> QuantizedAttention:
        """Quantized version of `attention` with quantizers of q, k and v (or none at all); it shares all attributes."""
        module: Any = recast(cls, attention)
        module.q_quantizer, module.k_quantizer, module.v_quantizer = quantizers or (None, None, None)
        return module

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """softmax(Q(q) Q(k)^T / sqrt(C)) Q(v) of (B, heads, tokens, C) tensors."""
        q, k, v = quantize_part(q, self, "q"), quantize_part(k, self, "k"), quantize_part(v, self, "v")
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class QuantMultiScaleAttention(QuantizedAttention, MultiScaleAttention):
    """Hiera's window or global attention; in pooling blocks q is quantized after pooling."""

    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', dim_out), H' and W' halved if q is pooled."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.unbind(2)  # (B, H*W, heads, C/heads)
        if self.q_pool is not None:
            q = do_pool(q.reshape(batch, height, width, -1), self.q_pool)
            height, width = q.shape[1:3]
            q = q.reshape(batch, height * width, self.num_heads, -1)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, H'*W', C/heads)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


class QuantAttention(QuantizedAttention, Attention):
    """Attention of the mask decoder's two-way transformer."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    dropout_p: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        """(B, tokens, C) each; returns (B, tokens of q, C). The last `num_k_exclude_rope` keys are object pointers."""
        q = split_heads(self.q_proj(q), self.num_heads)  # (B, heads, tokens, C/heads)
        k = split_heads(self.k_proj(k), self.num_heads)
        v = split_heads(self.v_proj(v), self.num_heads)
        q, k = self.with_positions(q, k, num_k_exclude_rope)
        out = self.attend(q, k, v, dropout_p=self.dropout_p if self.training else 0.0)
        return self.out_proj(join_heads(out))

    def with_positions(self, q: Tensor, k: Tensor, pointers: int) -> tuple[Tensor, Tensor]:
        """q and k (B, heads, tokens, C / heads) as they are compared: here they hold their positions already."""
        return q, k


class QuantRoPEAttention(QuantAttention, RoPEAttention):
    """Rotary attention of the memory attention; q and k are quantized after rotary encoding.

    The table of the model's feature size is a buffer outside the state dict; that of another square size is computed on
    each call.
    """

    rope_k_repeat: bool
    rotary_cos: Tensor
    rotary_sin: Tensor

    @classmethod
    def from_float(cls, attention: nn.Module, *quantizers: Quantizer | None) -> QuantizedAttention:
        """See the base class; the complex table becomes two real ones."""
        module: Any = super().from_float(attention, *quantizers)
        device = module.q_proj.weight.device
        module.register_buffer("rotary_cos", module.freqs_cis.real.to(device, copy=True), persistent=False)
        module.register_buffer("rotary_sin", module.freqs_cis.imag.to(device, copy=True), persistent=False)
        del module.freqs_cis
        return module

    def with_positions(self, q: Tensor, k: Tensor, pointers: int) -> tuple[Tensor, Tensor]:
        """Rotated q and k; the last `pointers` keys are not rotated.

        Raises:
            ValueError: there are not as many keys to rotate as queries or, with `rope_k_repeat`, a multiple of them.
        """
        table = rotary_table(self, q.shape[-2])
        queries, rotated, repeat = q.shape[-2], k.shape[-2] - pointers, self.rope_k_repeat
        if rotated % queries or not (repeat or rotated in (0, queries)):
            raise ValueError(
                f"rotary attention got {queries} queries, {rotated} keys to rotate, rope_k_repeat={repeat}"
            )
        if rotated:
            k = torch.cat((rotate(k[:, :, :rotated], *table), k[:, :, rotated:]), dim=2)
        return rotate(q, *table), k


def quantizer_of(attention: nn.Module, part: str) -> Quantizer | None:
    """Quantizer of q, k or v; None for a float attention."""
    return getattr(attention, f"{part}_quantizer", None)


def quantize_part(x: Tensor, attention: nn.Module, part: str) -> Tensor:
    """q, k or v, fake-quantized by the attention's quantizer if it has one."""
    quantizer = quantizer_of(attention, part)
    return x if quantizer is None else quantizer(x)


def is_quantizing(quantizer: Quantizer) -> bool:
    """True if the quantizer's forward rounds."""
    return quantizer.state in (QuantizerState.QUANTIZE, QuantizerState.FROZEN)


def rotary_table(attention: RoPEAttention, tokens: int) -> RotaryTable:
    """Cosines and sines for a number of query tokens, of a float or a quantized attention.

    Raises:
        ValueError: it is neither the model's own number nor a square; SAM2 would give wrong positions.
    """
    own = attention.rotary_cos.shape[0] if isinstance(attention, QuantRoPEAttention) else None
    if tokens == own:
        return attention.rotary_cos, attention.rotary_sin
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"rotary attention got {tokens} query tokens: give {own} or a square number")
    theta, device = attention.compute_cis.keywords["theta"], attention.q_proj.weight.device
    cos, sin = axial_rotary_table(attention.internal_dim // attention.num_heads, side, side, theta)
    return cos.to(device), sin.to(device)


def projects_values_last(attention: RoPEAttention) -> bool:
    """True if values can be projected after attention: one head, no quantizer of v, no gradients, on the CPU.

    There the narrow memory features are attended to and projected afterwards: fewer channels, fewer multiplications.
    """
    plain = type(attention.v_proj) is nn.Linear and quantizer_of(attention, "v") is None
    on_cpu = attention.v_proj.weight.device.type == "cpu"
    return plain and on_cpu and attention.num_heads == 1 and not torch.is_grad_enabled()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v, (B, heads, tokens of q, C').

    torch's fused CPU attention has no path for C' < C and gains nothing from bfloat16: in these cases scores are
    materialised, in the precision of q. The cross-attention of tiny to a full bank at 1024 px takes 0.48 s instead of
    0.70 s in float32 and 0.29 s instead of 0.68 s in bfloat16 on two cores.

    Args:
        q, k: (B, heads, tokens, C); v: (B, heads, tokens, C').
        bias: (B, 1, 1, tokens of k), added to the scores.
    """
    fused_is_slow = v.shape[-1] < q.shape[-1] or q.dtype == torch.bfloat16
    if not fused_is_slow or dropout_p or torch.is_grad_enabled() or q.device.type != "cpu" or is_watched():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
    scale, bias_of = 1 / math.sqrt(q.shape[-1]), [None] * len(q) if bias is None else bias[:, 0]
    with torch.autocast(q.device.type, enabled=False):
        items = [
            _attend_head(q[item, head] * scale, k[item, head], v[item, head].to(q.dtype), bias_of[item])
            for item in range(len(q))
            for head in range(q.shape[1])
        ]
    return torch.stack(items).unflatten(0, q.shape[:2])


def _attend_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one head, from matrices (tokens, C): products of batches of one would copy more."""
    row = -(-len(k) // ROW) * ROW
    scores = q.new_full((min(QUERIES, len(q)), row), -math.inf)
    v = F.pad(v, (0, 0, 0, row - len(k)))
    parts = []
    for part in q.split(QUERIES):
        rows = scores[: len(part)]
        columns = rows[:, : len(k)]
        torch.mm(part, k.T, out=columns)
        if bias is not None:
            columns += bias
        parts.append(rows.softmax(dim=-1) @ v)
    return torch.cat(parts)
