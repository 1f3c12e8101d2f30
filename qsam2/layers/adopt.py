"""One way to turn a float module into its quantized twin."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def adopt(cls: type[M], module: nn.Module) -> M:
    """A `cls` with all that `module` has: tensors, submodules and hooks are shared, the dictionaries of them copied."""
    twin = cls.__new__(cls)
    for name, value in vars(module).items():
        twin.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return twin
