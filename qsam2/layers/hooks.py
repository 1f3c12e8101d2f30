"""Watching layers: recording what passes through them while samples run through their model.

`hooked` records whole calls; `watch_inputs` checks what a statistic of calibration reads; `gather_halves` does so for
the samples that fit a statistic and for those held out to judge it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.output import listed

Sample = TypeVar("Sample")
Half = Literal["fit", "held_out"]


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], record: Callable[..., None], *, before: bool = False) -> Iterator[None]:
    """Context manager: `record(name, args, kwargs, output)` after each forward, or without `output` before it."""

    def on_call(name: str, _: nn.Module, *call: Any) -> None:
        record(name, *call)

    handles = []
    for name, module in modules.items():
        register: Callable[..., Any] = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(register(partial(on_call, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watch_inputs(
    layers: Mapping[str, nn.Module], record: Callable[[str, Tensor], None], *, remedy: str
) -> Iterator[None]:
    """Context manager: `record(name, x)` before each forward of a layer, x its first argument, detached.

    Raises:
        UserError: an input holds NaN or infinity, or a layer was not reached (`remedy` says what to do).
    """
    missed = dict.fromkeys(layers)

    def on_call(name: str, args: tuple[Tensor, ...], _: dict[str, Any]) -> None:
        x = args[0].detach()
        if not x.isfinite().all():
            raise UserError(f"NaN or infinity at the input of {name}: check the sample and the checkpoint")
        missed.pop(name, None)
        record(name, x)

    with hooked(layers, on_call, before=True):
        yield
    if missed:
        raise UserError(f"calibration samples did not reach {listed(list(missed))}: {remedy}")


def gather_halves(
    layers: Mapping[str, nn.Module],
    record: Callable[[Half, str, Tensor], None],
    run: Callable[[Sample], object],
    samples: Iterable[Sample],
    count: int,
    *,
    remedy: str,
) -> None:
    """`record(half, name, x)` for each input of a layer: the first `count // 2` samples fit, the others are held out.

    `run` passes one sample through the model that the layers belong to.

    Raises:
        UserError: fewer samples than `count` or than two; see `watch_inputs`, for each half.
    """
    count = max(count, 2)
    remaining, passed = iter(samples), 0
    halves: tuple[tuple[Half, int | None], ...] = (("fit", count // 2), ("held_out", None))
    for half, size in halves:
        with watch_inputs(layers, partial(record, half), remedy=remedy):
            for sample in itertools.islice(remaining, size):
                run(sample)
                passed += 1
            if passed < (size or count):
                raise UserError(f"calibration needs {count} samples, the data gave {passed}: give more stills or clips")


def nested_tensors(value: object) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and mappings, such as the arguments or the output of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from nested_tensors(inner)
