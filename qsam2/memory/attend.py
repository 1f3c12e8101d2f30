"""Attention that costs less where nothing is quantized in between (ours): over the memory itself, as matrix products.

Rows of softmax(QK^T) sum to one, so softmax(QK^T) (M W_v^T + b) = (softmax(QK^T) M) W_v^T + b: of memory M with 64
channels and values with 256, the weighted sum costs a quarter, and no values need be kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sam2.modeling.sam.transformer import RoPEAttention
from torch import Tensor, nn

from qsam2.memory.cache import quantizer_of

QUERIES = 1024
"""Scores are written out for so many queries at a time: 118 MB of them for a full bank at 1024 px in float32."""
ROW = 64
"""Rows of scores are a multiple of so many: products into rows that start anywhere take half as long again."""


def reads_memory_itself(attention: RoPEAttention) -> bool:
    """Whether its values are projected after attention: without heads, quantizers, dropout or gradients; on the CPU,
    where torch's fused attention has no short way for gradients or unequal channels.
    """
    plain = type(attention.v_proj) is nn.Linear and quantizer_of(attention, "v") is None
    return plain and attention.num_heads == 1 and not torch.is_grad_enabled() and _on_cpu(attention.v_proj.weight)


def attend(q: Tensor, k: Tensor, v: Tensor, raised: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(C) + raised) v of q, k (B, heads, tokens, C), v (B, heads, tokens, C') and raised (B, 1, 1,
    tokens): (B, heads, tokens of q, C').

    torch's fused CPU attention has no path for C' < C and gains nothing from bfloat16: there scores are written out, in
    the precision of q. Tiny's cross-attention to a full bank at 1024 px takes 0.48 s instead of 0.70 s in float32 and
    0.29 s instead of 0.68 s in bfloat16 on two cores.
    """
    faster = v.shape[-1] < q.shape[-1] or q.dtype == torch.bfloat16
    if not faster or dropout_p or torch.is_grad_enabled() or not _on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=raised, dropout_p=dropout_p)
    scale = 1 / math.sqrt(q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        items = [
            _plain(
                q[item, head] * scale,
                k[item, head],
                v[item, head].to(q.dtype),
                None if raised is None else raised[item, 0],
            )
            for item in range(len(q))
            for head in range(q.shape[1])
        ]
    return torch.stack(items).unflatten(0, q.shape[:2])


def _plain(q: Tensor, k: Tensor, v: Tensor, raised: Tensor | None) -> Tensor:
    """Of matrices (tokens, C): products of matrices take fewer copies than products of batches of one."""
    row = -(-len(k) // ROW) * ROW
    scores = q.new_full((min(QUERIES, len(q)), row), -math.inf)
    v = F.pad(v, (0, 0, 0, row - len(k)))
    parts = []
    for part in q.split(QUERIES):
        rows = scores[: len(part)]
        seen = rows[:, : len(k)]
        torch.mm(part, k.T, out=seen)
        if raised is not None:
            seen += raised
        parts.append(rows.softmax(dim=-1) @ v)
    return torch.cat(parts)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"
