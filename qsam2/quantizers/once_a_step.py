"""What is computed from parameters once an optimizer step and shared by all calls of it, gradients included (ours).

SAM2 calls a layer once a frame and once a click, parameters change once an optimizer step. What is shared keeps its
graph until `backward` has gone through it: forwards that share it take one `backward`; activation checkpointing has to
be the non-reentrant one, or shares nothing. A write through `parameter.data` goes unseen, as it does in autograd.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def outside_checkpointing() -> AbstractContextManager[None]:
    """A context whose graphs activation checkpointing does not see: it counts what it will recompute."""
    return torch.autograd.graph.saved_tensors_hooks(_save, _saved)


def forget_after_backward(shared: Tensor, owner: nn.Module, attribute: str) -> None:
    """Set an attribute of `owner` to None once backward frees the graph of `shared`: the next call builds its own."""
    reference = weakref.ref(owner)

    def forget(_: Tensor) -> None:
        if (alive := reference()) is not None:
            setattr(alive, attribute, None)

    shared.register_hook(forget)


def _save(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version


def _saved(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:  # hooks switch off autograd's own check
        raise RuntimeError("a parameter of a quantized layer was changed between forward and backward")
    return tensor
