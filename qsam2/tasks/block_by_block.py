"""Reconstruction of a whole model, one block after another: what each sees, what is stored, how it is stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from qsam2.calibration.data import CalibrationData, Sample, encode
from qsam2.calibration.reconstruction.blocks import Block, Scale, find_blocks
from qsam2.calibration.reconstruction.capture import capture
from qsam2.data.clips import collate_clips
from qsam2.models import SAM2
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.recipe.reconstruct import ReconstructRecipe
from qsam2.tasks.reconstruction import ReconstructedBlock, fit_block
from qsam2.tasks.trainer import SafeCheckpointIO

GIGABYTE = 1e9
STORED = "reconstruction"
"""Folder, in a run's `checkpoints/`, of the blocks that are finished."""
log = logging.getLogger("qsam2")


@dataclass
class Reconstruction:
    """What became of a model."""

    total: int
    """Blocks to reconstruct."""
    blocks: list[ReconstructedBlock] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """False where it was stopped: the other blocks are rounded to the nearest."""
        return len(self.blocks) == self.total

    @property
    def summary(self) -> str:
        """One line."""
        better = [block for block in self.blocks if block.kept]
        ratios = [math.log(block.error[1] / block.error[0]) for block in better]
        ratio = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
        text = (
            f"{len(self.blocks)} of {self.total} blocks reconstructed, "
            f"{len(better)} are better than nearest rounding, their error x {ratio:.2f} (geometric mean)"
        )
        return text if self.complete else f"{text}; STOPPED EARLY, the other blocks are rounded to the nearest"

    def figures(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {"complete": self.complete, "total": self.total, "blocks": [asdict(block) for block in self.blocks]}


def reconstruct(
    model: SAM2,
    teacher: SAM2,
    data: Mapping[Scale, CalibrationData],
    recipe: ReconstructRecipe,
    trainer_recipe: TrainerRecipe,
    *,
    folder: Path,
    seed: int,
    silent: bool = False,
) -> Reconstruction:
    """Fit rounding and steps of a calibrated model, block by block, to the float `teacher` (BRECQ, arXiv 2102.05426).

    A block sees what the quantized model gives it, with all blocks before it reconstructed and those behind it rounded
    to the nearest; tracking blocks see a memory that the quantized model filled. Its target is the output of the
    teacher's block on the same sample. Finished blocks are stored: a run that was killed goes on behind them. The first
    Ctrl-C ends reconstruction and leaves a usable model, the second one the run.

    Args:
        data: stills and clips for the blocks of each scale; those of the scale "frame" see them frame by frame.
        folder: the run folder.
        silent: no progress bar.
    """
    groups = find_blocks(model, recipe)
    done = Reconstruction(sum(len(group) for group in groups))
    twins = dict(teacher.named_modules())
    samples: list[Tensor] | list[Sample] = []
    scale: Scale | None = None

    def run(quantized: bool, sample: Tensor | Sample) -> None:
        if stopped():
            raise _Stopped
        network = model if quantized else teacher
        if isinstance(sample, Sample):
            track_clip(network, sample)
        else:
            network.forward_image(sample.to(network.device))

    with (
        _interruptible() as stopped,
        tqdm(total=done.total, desc="reconstruct", disable=silent) as bar,
        contextlib.suppress(_Stopped),
    ):
        for index, group in enumerate(groups):
            file = folder / "checkpoints" / STORED / f"{index:03d}.ckpt"
            if file.is_file():
                rows = _load(file, group)
                done.blocks += rows
                bar.update(len(rows))
                continue
            bar.set_postfix_str(f"{group[0].name}: inputs")
            if group[0].scale != scale:
                scale = group[0].scale
                samples = _frames(data[scale]) if scale == "frame" else list(data[scale].clip_samples())
            calls = capture(
                {block.name: block.module for block in group},
                {block.name: twins[block.name] for block in group},
                run,
                samples,
                budget_bytes=recipe.cache_gb * GIGABYTE,
                one_call=scale == "frame",
            )
            for number, block in enumerate(group):
                bar.set_postfix_str(block.name)
                row = fit_block(
                    block.name,
                    block.module,
                    calls.pop(block.name),
                    recipe,
                    trainer_recipe,
                    folder=folder,
                    image_size=model.image_size,
                    seed=_seed(seed, index, number),
                    stopped=stopped,
                )
                if row is None:
                    raise _Stopped
                done.blocks.append(row)
                bar.update()
            _save(file, group, done.blocks[-len(group) :])
    return done


@torch.no_grad()
def track_clip(model: SAM2, sample: Sample) -> list[list[dict[str, Any]]]:
    """Track a clip in eval mode from masks, then from one click each; no corrections, which depend on the masks.

    So the quantized and the float model get the same prompts. Returns a frame's outputs each, for either prompt.
    """
    features, batch = encode(model, sample), collate_clips([sample.clip]).to(model.device)
    outputs = []
    for points in (False, True):
        model.prob_to_use_pt_input_for_eval = float(points)
        prompted = model.prepare_prompt_inputs({**features}, batch)
        prompted["frames_to_add_correction_pt"] = []
        outputs.append(model.forward_tracking(prompted, batch))
    return outputs


def _frames(data: CalibrationData) -> list[Tensor]:
    """All frames of stills and clips, (1, 3, S, S) each."""
    return [image for sample in data.samples() for image in sample.clip.images.split(1)]


class _Stopped(Exception):
    """The user has had enough of it."""


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; pressed again, it does what it did before."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        log.warning("reconstruction stops: the other blocks stay rounded to the nearest; Ctrl-C again ends the run")
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@rank_zero_only
def _save(file: Path, group: Sequence[Block], rows: Sequence[ReconstructedBlock]) -> None:
    state = {block.name: block.module.state_dict() for block in group}
    SafeCheckpointIO().save_checkpoint({"rows": [asdict(row) for row in rows], "state": state}, file)


def _load(file: Path, group: Sequence[Block]) -> list[ReconstructedBlock]:
    stored = SafeCheckpointIO().load_checkpoint(file)
    for block in group:
        block.module.load_state_dict(stored["state"][block.name])
    return [ReconstructedBlock(**row) for row in stored["rows"]]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
