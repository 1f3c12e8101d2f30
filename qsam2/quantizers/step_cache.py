"""Cache of tensors that are computed from parameters once per optimizer step, gradients included (ours).

SAM2 calls a layer once per frame and once per click, while parameters change once per optimizer step. A cached tensor
keeps its graph until `backward` has passed through it: all forwards that share it need one common `backward`. It is
shared under non-reentrant activation checkpointing only. As in autograd, a write through `parameter.data` is not seen.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def version_of(tensor: Tensor) -> object:
    """Number of times a tensor was written to; a new object for one of `torch.inference_mode`, where nobody counts."""
    return object() if tensor.is_inference() else tensor._version


def hidden_from_checkpointing() -> AbstractContextManager[None]:
    """Context in which saved tensors are hidden from activation checkpointing, which would recompute them."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def clear_after_backward(shared: Tensor, owner: nn.Module, attribute: str) -> None:
    """Set an attribute of `owner` to None once backward has freed the graph of `shared`."""
    reference = weakref.ref(owner)

    def clear(_: Tensor) -> None:
        if (module := reference()) is not None:
            setattr(module, attribute, None)

    shared.register_hook(clear)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:  # these hooks switch off autograd's own check
        raise RuntimeError("a parameter of a quantized layer was changed between forward and backward")
    return tensor
