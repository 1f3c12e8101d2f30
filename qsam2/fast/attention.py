"""Attention as products of matrices: on the CPU faster in bfloat16 than PyTorch's fused one, which gains nothing there.

Measured: docs/speed.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qsam2.memory.attend import attend as attend_in_rows

WINDOW_TOKENS = 1024
"""Up to so many keys the scores of all windows and heads fit the cache as one batch."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of (B, heads, tokens, C); by PyTorch's fused attention where that is faster."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    if k.shape[-2] > WINDOW_TOKENS:
        return attend_in_rows(q, k, v)
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)  # (B, heads, tokens of q, tokens of k)
    return scores.softmax(dim=-1) @ v
