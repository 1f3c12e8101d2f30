"""SAM2's three attention classes with quantized q, k and v.

Fused attention runs on the quantized tensors (ours): quantizing the score matrix would materialise it, 471 MB an object
and layer in the memory attention at 1024 px. Rotary encoding is real-valued, so that the model can be exported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import MultiScaleAttention, do_pool
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import Tensor, nn

from qsam2.layers.adopt import adopt
from qsam2.quantizers import Quantizer


def axial_rotary_table(dim: int, width: int, height: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (width * height, dim / 2) float32: half of the channels turn with x, the others with y.

    Axial rotary encoding of Heo et al. (arXiv 2403.13298), with the frequencies that SAM2 has.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 4)[: dim // 4].float() / dim)
    positions = torch.arange(width * height)
    columns, rows = positions % width, positions // width
    angles = torch.cat([torch.outer(axis.float(), frequencies) for axis in (columns, rows)], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding of x (B, heads, r * N, C) by a table of N positions (N, C / 2), repeated r times, in float32.

    Channels (2i, 2i + 1) are one pair, turned by the angle of their position: SAM2's complex product in real numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2)).unflatten(2, (-1, cos.shape[0]))  # (B, heads, r, N, C/2, 2)
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.reshape(x.shape).type_as(x)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, tokens, C) to (B, heads, tokens, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, tokens, C / heads) to (B, tokens, C)."""
    return x.transpose(1, 2).flatten(2)


class QuantizedAttention(nn.Module):
    """What the three attentions share: a quantizer each for q, k and v (None: left as it is), then fused attention."""

    q_quantizer: Quantizer | None
    k_quantizer: Quantizer | None
    v_quantizer: Quantizer | None

    @classmethod
    def from_float(
        cls,
        attention: nn.Module,
        q_quantizer: Quantizer | None = None,
        k_quantizer: Quantizer | None = None,
        v_quantizer: Quantizer | None = None,
    ) -> QuantizedAttention:
        """The quantized twin of `attention`; it shares the projections and all attributes."""
        module: Any = adopt(cls, attention)
        module.q_quantizer, module.k_quantizer, module.v_quantizer = q_quantizer, k_quantizer, v_quantizer
        return module

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """softmax(Q(q) Q(k)^T / sqrt(C)) Q(v) of (B, heads, tokens, C) tensors."""
        q = q if self.q_quantizer is None else self.q_quantizer(q)
        k = k if self.k_quantizer is None else self.k_quantizer(k)
        v = v if self.v_quantizer is None else self.v_quantizer(v)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class QuantMultiScaleAttention(QuantizedAttention, MultiScaleAttention):
    """Hiera's window or global attention; where the block pools, q is quantized after pooling."""

    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', dim_out), H' and W' halved where q is pooled."""
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, tokens, C) each; returns (B, tokens of q, C)."""
        q = split_heads(self.q_proj(q), self.num_heads)  # (B, heads, tokens, C/heads)
        k = split_heads(self.k_proj(k), self.num_heads)
        v = split_heads(self.v_proj(v), self.num_heads)
        out = self.attend(q, k, v, dropout_p=self.dropout_p if self.training else 0.0)
        return self.out_proj(join_heads(out))


class QuantRoPEAttention(QuantizedAttention, RoPEAttention):
    """Rotary attention of the memory attention; q and k are quantized after rotary encoding.

    The table of the model's own feature size is a buffer outside the state dict; another square
    size computes its own on each call.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    dropout_p: float
    internal_dim: int
    rope_k_repeat: bool
    rotary_theta: float
    rotary_cos: Tensor
    rotary_sin: Tensor

    @classmethod
    def from_float(
        cls,
        attention: nn.Module,
        q_quantizer: Quantizer | None = None,
        k_quantizer: Quantizer | None = None,
        v_quantizer: Quantizer | None = None,
    ) -> QuantizedAttention:
        """As the base class does; the complex table becomes two real ones."""
        module: Any = super().from_float(attention, q_quantizer, k_quantizer, v_quantizer)
        device = module.q_proj.weight.device
        module.rotary_theta = module.compute_cis.keywords["theta"]
        module.register_buffer("rotary_cos", module.freqs_cis.real.to(device, copy=True), persistent=False)
        module.register_buffer("rotary_sin", module.freqs_cis.imag.to(device, copy=True), persistent=False)
        del module.freqs_cis, module.compute_cis
        return module

    def rotary_table(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for that many query tokens.

        Raises ValueError where they are neither the model's own number nor a square, which SAM2 would place wrongly.
        """
        if tokens == self.rotary_cos.shape[0]:
            return self.rotary_cos, self.rotary_sin
        side = math.isqrt(tokens)
        if side * side != tokens:
            own = self.rotary_cos.shape[0]
            raise ValueError(f"rotary attention got {tokens} query tokens: give {own} or a square number")
        cos, sin = axial_rotary_table(self.internal_dim // self.num_heads, side, side, self.rotary_theta)
        return cos.to(self.rotary_cos.device), sin.to(self.rotary_cos.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        """(B, tokens, C) each; the last `num_k_exclude_rope` keys (object pointers) are not rotated.

        Returns (B, tokens of q, C). Raises ValueError where the keys to rotate are not as many as the queries or, with
        `rope_k_repeat`, a multiple of them.
        """
        q = split_heads(self.q_proj(q), self.num_heads)  # (B, heads, N, C/heads)
        k = split_heads(self.k_proj(k), self.num_heads)
        v = split_heads(self.v_proj(v), self.num_heads)

        cos, sin = self.rotary_table(q.shape[-2])
        queries, rotated = q.shape[-2], k.shape[-2] - num_k_exclude_rope
        if rotated % queries or not (self.rope_k_repeat or rotated in (0, queries)):
            repeat = self.rope_k_repeat
            raise ValueError(
                f"rotary attention got {queries} queries, {rotated} keys to rotate, rope_k_repeat={repeat}"
            )
        q = rotate(q, cos, sin)
        if rotated:
            k = torch.cat((rotate(k[:, :, :rotated], cos, sin), k[:, :, rotated:]), dim=2)

        out = self.attend(q, k, v, dropout_p=self.dropout_p if self.training else 0.0)
        return self.out_proj(join_heads(out))
