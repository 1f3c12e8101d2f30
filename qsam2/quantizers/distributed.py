"""Statistics that are the same on all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks; x itself in a single process. Every rank must call it equally often."""
    return _all_reduce(x, dist.ReduceOp.SUM) if _several_ranks() else x


def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum over ranks; x itself in a single process. Every rank must call it equally often."""
    return _all_reduce(x, dist.ReduceOp.MAX) if _several_ranks() else x


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = x.clone()
    dist.all_reduce(reduced, op=op)
    return reduced
