"""Reconstruction of a whole model, block after block, with finished blocks stored and Ctrl-C handled.

A block's inputs come from the quantized model with all earlier blocks reconstructed and later ones rounded to the
nearest, its targets from the float model on the same sample (BRECQ, arXiv 2102.05426).
"""

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
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.forward import ImageFeatures
from qsam2.data.calibration_data import CalibrationData, Sample
from qsam2.layers.convert import quantizers
from qsam2.models import SAM2
from qsam2.recipe.calibrate import ReconstructRecipe
from qsam2.reconstruction.blocks import Block, Scale, find_blocks
from qsam2.reconstruction.capture import capture
from qsam2.reconstruction.fit_block import ReconstructedBlock, fit_block
from qsam2.reconstruction.fit_video import fit_video, track_clip
from qsam2.reconstruction.time_scales import time_scales
from qsam2.run import Run
from qsam2.train.trainer import SafeCheckpointIO

GIGABYTE = 1e9
SMALLEST = 1e-9
STORED = "reconstruction"
"""Folder of finished blocks in a run's `checkpoints/`."""
log = logging.getLogger("qsam2")


def reconstruct_blocks(run: Run) -> None:
    """Stage: fit rounding of weights and steps of activations, block by block, to the float model, in place.

    Tracking blocks read a memory filled by the quantized model. With `reconstruct.video` the steps of all blocks are
    then fitted together. Finished blocks are stored, and a resumed run continues after them. The first Ctrl-C ends
    reconstruction and leaves a usable model, the second one ends the run.

    Raises:
        UserError: see `find_blocks` and `capture`; a loss is not finite, the disk is full.
    """
    recipe = run.recipe.reconstruct
    if recipe is None or run.teacher is None:
        return
    with (
        run.folder.stage("reconstruct", f"{recipe.method}, {recipe.iterations} iterations per block"),
        _interruptible() as stopped,
    ):
        run.prepare_inference()
        result = _reconstruct(run, run.teacher, recipe, stopped)
    log.log(logging.INFO if result.complete else logging.WARNING, "%s", result.summary)
    run.folder.record("reconstruction", result.figures())


@dataclass
class Reconstruction:
    """Result for a model."""

    total: int
    """Blocks to reconstruct."""
    fits_video: bool = False
    """True if the recipe fits steps on video after the blocks."""
    blocks: list[ReconstructedBlock] = field(default_factory=list)
    video: tuple[float, float] | None = None
    """Loss on video before and after the fit."""

    @property
    def complete(self) -> bool:
        """False after Ctrl-C: the remaining blocks are rounded to the nearest."""
        return len(self.blocks) == self.total and (self.video is not None or not self.fits_video)

    @property
    def summary(self) -> str:
        """The result in one line."""
        better = [block for block in self.blocks if block.kept]
        ratios = [math.log(max(block.error[1] / block.error[0], SMALLEST)) for block in better]
        ratio = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
        text = (
            f"{len(self.blocks)} of {self.total} blocks reconstructed, "
            f"{len(better)} are better than nearest rounding, their error x {ratio:.2f} (geometric mean)"
        )
        if self.video is not None:
            text += f"; loss on video {self.video[0]:.4f} -> {self.video[1]:.4f}"
        return text if self.complete else f"{text}; STOPPED EARLY, the other blocks are rounded to the nearest"

    def figures(self) -> dict[str, Any]:
        """Values for `metrics.json`."""
        return {
            "complete": self.complete,
            "total": self.total,
            "blocks": [asdict(block) for block in self.blocks],
            "video": self.video,
        }


def _reconstruct(run: Run, teacher: SAM2, recipe: ReconstructRecipe, stopped: Callable[[], bool]) -> Reconstruction:
    video = recipe.video
    data = dict.fromkeys(get_args(Scale), run.calibration) if video is None else time_scales(run)
    scales = [scale for scale in data if video is None or getattr(video, scale) > 0]
    groups = [group for group in find_blocks(run.model, recipe) if group[0].scale in scales]
    result = Reconstruction(sum(len(group) for group in groups), video is not None and video.iterations > 0)
    samples: Sequence[Tensor | Sample] = ()
    source: tuple[CalibrationData, bool] | None = None
    with (
        tqdm(total=result.total + result.fits_video, desc="reconstruct", disable=run.silent) as bar,
        contextlib.suppress(_Stopped),
    ):
        session = _Session(run, teacher, recipe, stopped, bar)
        for index, group in enumerate(groups):
            modules, file = {block.name: block.module for block in group}, session.file(f"{index:03d}")
            if (stored := _load(file, modules)) is not None:
                result.blocks += [ReconstructedBlock(**row) for row in stored]
                bar.update(len(stored))
                continue
            frames = group[0].scale == "frame"
            if source != (data[group[0].scale], frames):
                source = (data[group[0].scale], frames)
                samples = _frames(source[0]) if frames else list(source[0].clip_samples())
                session.clear_features()
            for row in session.fit_group(group, samples, seed=_seed(run.recipe.seed, index)):
                result.blocks.append(row)
                bar.update()
            _save(file, modules, [asdict(row) for row in result.blocks[-len(group) :]])
        if result.fits_video:
            result.video = session.fit_video({scale: list(data[scale].clip_samples()) for scale in scales})
            bar.update()
    return result


@dataclass(frozen=True)
class _Session:
    """State shared by all blocks of a run."""

    run: Run
    teacher: SAM2
    recipe: ReconstructRecipe
    stopped: Callable[[], bool]
    bar: Any
    features: dict[bool, ImageFeatures] = field(default_factory=dict)
    """Features of the clips in the quantized (True) and float model; no block that is fitted on clips changes them."""

    def file(self, name: str) -> Path:
        """File of a finished block, or of the fit on video."""
        return self.run.folder.path / "checkpoints" / STORED / f"{name}.ckpt"

    def clear_features(self) -> None:
        """Drop the features of former clips."""
        budget = self.recipe.cache_gb * GIGABYTE / 2
        self.features.update({True: ImageFeatures(self.run.model, budget), False: ImageFeatures(self.teacher, budget)})

    def fit_group(
        self, group: Sequence[Block], samples: Sequence[Tensor | Sample], seed: int
    ) -> Iterator[ReconstructedBlock]:
        """Capture the calls of a group's blocks, then fit one after another."""
        self.bar.set_postfix_str(f"{group[0].name}: inputs")
        calls = capture(
            {block.name: block.module for block in group},
            {block.name: self.teacher.get_submodule(block.name) for block in group},
            self.forward,
            samples,
            budget_bytes=self.recipe.cache_gb * GIGABYTE,
            one_call=group[0].scale == "frame",
        )
        for number, block in enumerate(group):
            self.bar.set_postfix_str(block.name)
            row = fit_block(
                block.name,
                block.module,
                calls.pop(block.name),
                self.recipe,
                self.run.recipe.trainer,
                folder=self.run.folder.path,
                image_size=self.run.model.image_size,
                seed=_seed(seed, number),
                stopped=self.stopped,
            )
            if row is None:
                raise _Stopped
            yield row

    def forward(self, quantized: bool, sample: Tensor | Sample) -> None:
        """Pass a frame, or a clip twice, through the quantized or the float model."""
        if self.stopped():
            raise _Stopped
        network = self.run.model if quantized else self.teacher
        if not isinstance(sample, Sample):
            network.forward_image(sample.to(network.device))
            return
        features = self.features[quantized].of(sample)
        for points in (False, True):
            track_clip(network, sample, features, points=points)

    def fit_video(self, samples: Mapping[Scale, Sequence[Sample]]) -> tuple[float, float]:
        """See `qsam2.reconstruction.fit_video`."""
        self.bar.set_postfix_str("steps on " + ", ".join(samples))
        activations = {name: q for name, q in quantizers(self.run.model) if q.role == "activation"}
        if (stored := _load(self.file("video"), activations)) is not None:
            return stored[0], stored[1]
        assert self.recipe.video is not None
        losses = fit_video(
            self.run.model,
            self.teacher,
            samples,
            self.recipe.video,
            self.run.recipe.trainer,
            folder=self.run.folder.path,
            stopped=self.stopped,
        )
        if losses is None:
            raise _Stopped
        _save(self.file("video"), activations, list(losses))
        return losses


def _frames(data: CalibrationData) -> list[Tensor]:
    """All frames of stills and clips, (1, 3, S, S) each."""
    return [image for sample in data.samples() for image in sample.clip.images.split(1)]


class _Stopped(Exception):
    """Ctrl-C was pressed."""


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Context manager: a function that returns True once Ctrl-C was pressed; the second Ctrl-C interrupts as usual."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
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
def _save(file: Path, modules: Mapping[str, nn.Module], figures: list[Any]) -> None:
    state = {name: module.state_dict() for name, module in modules.items()}
    SafeCheckpointIO().save_checkpoint({"figures": figures, "state": state}, file)


def _load(file: Path, modules: Mapping[str, nn.Module]) -> list[Any] | None:
    """Stored figures, with the states of the modules restored; None if nothing is stored."""
    if not file.is_file():
        return None
    stored = SafeCheckpointIO().load_checkpoint(file)
    for name, module in modules.items():
        module.load_state_dict(stored["state"][name])
    return stored["figures"]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
