"""Time of contestants in turn, memory of one of them, and the machine they run on."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from tqdm import tqdm

from qsam2.errors import UserError
from qsam2.models import SAM2, build_sam2
from qsam2.output import cpu_name

WARM_UPS = 2
PACKAGES = ("qsam2", "torch", "sam2", "brevitas", "torchao")

Seconds = tuple[float, ...]


class Tracking:
    """A contestant: each call tracks one more frame, and gives its seconds and those of the parts."""

    parts: tuple[str, ...]

    def __init__(self) -> None:
        self.taken = dict.fromkeys(self.parts, 0.0)

    def __call__(self) -> Seconds:
        self.taken = dict.fromkeys(self.parts, 0.0)
        started = now()
        self.step()
        return now() - started, *self.taken.values()

    def step(self) -> None:
        """Track one more frame."""
        raise NotImplementedError

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is that of a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = now()
            result = function(*args, **kwargs)
            self.taken[part] += now() - started
            return result

        return run


def now() -> float:
    """Seconds; on one thread those of the processor, which other programs disturb less."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def medians(contestants: Mapping[str, Callable[[], Seconds]], repeats: int, *, progress: str) -> dict[str, Seconds]:
    """Runs contestants in turn, `repeats` rounds after the warm-ups; the median of each time that they return."""
    taken: dict[str, list[Seconds]] = {name: [] for name in contestants}
    rounds = WARM_UPS + repeats
    gc.collect()
    gc.freeze()  # what is there stays: the collections between the runs need not look at it
    with tqdm(total=rounds * len(contestants), desc=progress, leave=False) as bar:
        for index in range(rounds):
            for name, run in contestants.items():
                gc.collect()  # not within the time of the next one
                seconds = run()
                if index >= WARM_UPS:
                    taken[name].append(seconds)
                bar.update()
    gc.unfreeze()
    return {name: tuple(map(median, zip(*times, strict=True))) for name, times in taken.items()}


def peak_allocated_bytes(run: Callable[[], object]) -> int:
    """Peak bytes of tensors, above the level at the start, while `run` runs on the CPU.

    It counts what PyTorch's CPU allocator hands out and takes back, to the byte: tensors, gradients, what backward
    saves, and temporaries within operations. It does not see what oneDNN and other libraries allocate themselves, nor
    what malloc keeps of freed memory, which would make the figure depend on what ran before.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks about devices that are not there
    gc.collect()
    with profile(profile_memory=True) as profiler:
        run()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, a shared one counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def random_sam2(size: str, image_size: int | None) -> SAM2:
    """A model with random weights that sees objects: without this all its masks would be constant."""
    torch.manual_seed(0)
    model = build_sam2(size, image_size=image_size)
    nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    return model


def check_positive(**numbers: int) -> None:
    """Raise UserError for the flag whose number is not positive."""
    for flag, number in numbers.items():
        if number < 1:
            raise UserError(f"--{flag} {number}: give a whole number from 1 up")


def machine() -> dict[str, Any]:
    """CPU, threads and the versions of what is installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "versions": versions}
