"""What all ranks hold together."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks; x itself in a single process. Every rank must call it equally often."""
    return _all_reduce(x, dist.ReduceOp.SUM) if world_size() > 1 else x


def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum over ranks; x itself in a single process. Every rank must call it equally often."""
    return _all_reduce(x, dist.ReduceOp.MAX) if world_size() > 1 else x


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = x.clone()
    dist.all_reduce(reduced, op=op)
    return reduced
