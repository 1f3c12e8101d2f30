"""Training data of a block: its inputs in the quantized model, and its outputs in the float model as targets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.hooks import hooked, nested_tensors

Sample = TypeVar("Sample")


class Call(NamedTuple):
    """One call of a block: its inputs, and the float model's outputs (see `output_tensors`)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Tensor, ...]


class CallBuffer:
    """Values of a block's calls in bounded memory: beyond `budget_bytes`, every second value is dropped."""

    def __init__(self, budget_bytes: float, stride: int = 1) -> None:
        self.budget_bytes = budget_bytes
        self.stride = stride
        self.count = 0
        self.values: list[Any] = []
        self._bytes: list[int] = []

    def add(self, value: Any) -> None:
        """Count a call, and copy its value to the CPU if its number is a multiple of the stride."""
        if self.count % self.stride == 0:
            copied = apply_to_collection(value, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
            self.values.append(copied)
            self._bytes.append(sum(tensor.nbytes for tensor in nested_tensors(copied)))
        self.count += 1
        while sum(self._bytes) > self.budget_bytes and len(self.values) > 1:
            self.values, self._bytes, self.stride = self.values[::2], self._bytes[::2], 2 * self.stride


class _AllReached(Exception):
    """Ends a forward after its last block."""


@torch.no_grad()
def capture(
    blocks: Mapping[str, nn.Module],
    float_blocks: Mapping[str, nn.Module],
    run: Callable[[bool, Sample], object],
    samples: Sequence[Sample],
    *,
    budget_bytes: float,
    one_call: bool,
) -> dict[str, list[Call]]:
    """Inputs of the blocks of a quantized model, and outputs of the float model's blocks on the same samples.

    Calls are kept on the CPU, within `budget_bytes`.

    Args:
        float_blocks: the blocks' modules in the float model.
        run: `run(quantized, sample)` passes a sample through one of the two models.
        one_call: `run` calls each block once, so that the rest of the forward is skipped.

    Raises:
        UserError: a block was not reached, or its inputs or targets hold NaN or infinity.
    """
    share = budget_bytes / 2 / len(blocks)
    inputs = {name: CallBuffer(share) for name in blocks}

    def add_inputs(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        inputs[name].add((args, kwargs))

    _record(blocks, add_inputs, partial(run, True), samples, one_call)
    targets = {name: CallBuffer(share, inputs[name].stride) for name in blocks}

    def add_targets(name: str, _: tuple[Any, ...], __: dict[str, Any], output: Any) -> None:
        targets[name].add(output_tensors(output))

    _record(float_blocks, add_targets, partial(run, False), samples, one_call)
    return {name: _calls(name, inputs[name], targets[name]) for name in blocks}


def _record(
    blocks: Mapping[str, nn.Module],
    record: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None],
    run: Callable[[Sample], object],
    samples: Iterable[Sample],
    one_call: bool,
) -> None:
    """`record(name, args, kwargs, output)` for each call of a block."""
    waiting: set[str] = set()

    def on_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record(name, args, kwargs, output)
        waiting.discard(name)
        if one_call and not waiting:
            raise _AllReached

    with hooked(blocks, on_call):
        for sample in samples:
            waiting.update(blocks)
            with contextlib.suppress(_AllReached):
                run(sample)


def _calls(name: str, inputs: CallBuffer, targets: CallBuffer) -> list[Call]:
    if not inputs.count:
        raise UserError(
            f"calibration samples did not reach {name}: give more clips, or leave it out of reconstruct.blocks"
        )
    if inputs.count != targets.count:
        raise RuntimeError(f"{name} was called {inputs.count} times, in the float model {targets.count} times")
    kept = inputs.values[:: targets.stride // inputs.stride]
    calls = [Call(args, kwargs, target) for (args, kwargs), target in zip(kept, targets.values, strict=True)]
    if not all(tensor.isfinite().all() for tensor in nested_tensors(calls) if tensor.is_floating_point()):
        raise UserError(f"the inputs or float outputs of {name} contain NaN or infinity: check the clips and the model")
    return calls


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """Tensors of a block's output that depend on its input, which excludes position encodings."""
    if isinstance(output, dict):  # memory encoder
        return (output["vision_features"],)
    if isinstance(output, tuple) and isinstance(output[0], list):  # neck
        return tuple(output[0])
    return tuple(nested_tensors(output))
