"""Cost of a tracked frame end to end, with a full memory bank: stock sam2, other runtimes, ours."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qsam2.benchmark.engines import ENGINES, PARTS, Setting
from qsam2.benchmark.measure import WARM_UPS, machine, medians
from qsam2.errors import UserError
from qsam2.models import build_sam2
from qsam2.models.replaced import hide_progress_bar

COLUMNS = ("seconds_per_frame", *(f"{part}_seconds" for part in PARTS))


def benchmark_tracking(
    *, size: str, image_size: int | None, repeats: int, engines: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    """Tracks the same noise with the same random weights in all engines in turn, a frame each, on the CPU.

    Returns {ENGINE: {"seconds_per_frame", "encoder_seconds", "memory_seconds", "decoder_seconds"}}, medians over
    `repeats` frames, each behind a full bank; on one thread of its CPU time. Memory is memory attention and memory
    encoder, the decoder has the prompt encoder in it; what is left is reading the frame, and resizing and choosing
    masks.

    Args:
        engines: of `ENGINES`; None: all whose packages are installed.

    Raises:
        UserError: `repeats` is not positive, an engine, size or image size is none, an engine that was asked for
            needs what is not installed.
    """
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: give a whole number from 1 up")
    chosen = _chosen(engines)
    torch.manual_seed(0)
    model = build_sam2(size, image_size=image_size)
    # Random weights see no object; without this all masks would be constant.
    nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    fill = max(model.num_maskmem - WARM_UPS, 1)  # the warm-ups fill the rest of the bank
    frames = _Noise(model.image_size, fill + WARM_UPS + repeats)
    with tempfile.TemporaryDirectory() as folder, hide_progress_bar():
        setting = Setting(model, frames, Path(folder))
        runs = {name: ENGINES[name].start(setting) for name in chosen}
        for run in runs.values():
            for _ in range(fill):
                run()
        seconds = medians(runs, repeats, progress="tracking")
    return {name: dict(zip(COLUMNS, seconds[name], strict=True)) for name in runs}


def _chosen(engines: Sequence[str] | None) -> list[str]:
    if engines is None:
        return [name for name, engine in ENGINES.items() if engine.missing() is None]
    for name in engines:
        if name not in ENGINES:
            near = get_close_matches(name, ENGINES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--engines {name!r} is unknown: choose from {', '.join(ENGINES)}{hint}")
        if missing := ENGINES[name].missing():
            raise UserError(f"--engines {name!r} needs {missing}: {ENGINES[name].install}")
    if not engines:
        raise UserError(f"--engines names none: choose from {', '.join(ENGINES)}")
    return list(engines)


class _Noise(Sequence[NDArray[np.uint8]]):
    """Frames of noise, the same on each reading."""

    def __init__(self, side: int, length: int) -> None:
        self.side, self.length = side, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> NDArray[np.uint8]:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(index)
        return np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)


def markdown_table(result: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of `benchmark_tracking` as text, a row an engine, with its note; then what was left out and why."""
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = "CPU time of one thread" if about["threads"] == 1 else f"{about['threads']} threads"
    lines = [f"{about['cpu']}, {threads}, {versions}", ""]
    lines += [
        "| engine | frame s | times faster | encoder s | memory s | decoder s | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        faster = f"{result['sam2']['seconds_per_frame'] / row['seconds_per_frame']:.2f}" if "sam2" in result else "-"
        frame, *parts = (f"{row[column]:.3f}" for column in COLUMNS)
        lines.append(f"| {' | '.join([name, frame, faster, *parts, ENGINES[name].note])} |")
    for name, engine in ENGINES.items():
        if missing := engine.missing():
            lines.append(f"{name} is left out, it needs {missing}: {engine.install}")
    return "\n".join(lines)
