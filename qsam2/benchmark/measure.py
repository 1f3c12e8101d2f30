"""Time of contestants in turn, memory of one of them, and the machine they run on."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from tqdm import tqdm

WARM_UPS = 2
PACKAGES = ("qsam2", "torch", "sam2", "brevitas", "torchao")

Seconds = tuple[float, ...]


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


def machine() -> dict[str, Any]:
    """CPU, threads and the versions of what is installed."""
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "versions": dict(_versions())}


def _versions() -> Iterable[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows it
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
