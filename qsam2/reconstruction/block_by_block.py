"""Reconstruction of a whole model, block after block, with finished blocks stored and Ctrl-C handled.

A block's inputs come from the quantized model with all earlier blocks reconstructed and later ones as calibrated, its
targets from the float model on the same sample (BRECQ, arXiv 2102.05426).
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
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
from qsam2.reconstruction.blocks import Group, Scale, capture, find_blocks
from qsam2.reconstruction.fit_block import ReconstructedBlock, fit_block
from qsam2.reconstruction.fit_video import fit_video, time_scales, track_clip
from qsam2.run import Run
from qsam2.train.trainer import SafeCheckpointIO

GIGABYTE = 1e9
SMALLEST = 1e-9
log = logging.getLogger("qsam2")


def reconstruct_blocks(run: Run) -> None:
    """Stage: fit rounding of weights or these themselves, and steps, block by block, to the float model, in place.

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
        reconstruction = Reconstruction(run, run.teacher, recipe, stopped)
        with contextlib.suppress(_Stopped):
            reconstruction.fit()
    log.log(logging.INFO if reconstruction.complete else logging.WARNING, "%s", reconstruction.summary)
    figures = {
        "complete": reconstruction.complete,
        "total": reconstruction.total,
        "blocks": [asdict(block) for block in reconstruction.blocks],
        "video": reconstruction.losses,
    }
    run.folder.record("reconstruction", figures)


class Reconstruction:
    """The reconstruction of a run's model, and its result."""

    def __init__(self, run: Run, teacher: SAM2, recipe: ReconstructRecipe, stopped: Callable[[], bool]) -> None:
        self.run, self.teacher, self.recipe, self.stopped = run, teacher, recipe, stopped
        video = recipe.video
        self.data = dict.fromkeys(get_args(Scale), run.calibration) if video is None else time_scales(run)
        self.scales: list[Scale] = [scale for scale in self.data if video is None or getattr(video, scale) > 0]
        self.groups = [group for group in find_blocks(run.model, recipe) if group.scale in self.scales]
        self.total = sum(len(group.blocks) for group in self.groups)
        self.fits_video = video is not None and video.iterations > 0
        self.blocks: list[ReconstructedBlock] = []
        self.losses: tuple[float, float] | None = None
        """Loss on video before and after the fit."""
        self.features: dict[bool, ImageFeatures] = {}
        """Of the clips in the quantized (True) and float model; no block that is fitted on clips changes them."""

    @property
    def complete(self) -> bool:
        """False after Ctrl-C: the remaining blocks are as they were."""
        return len(self.blocks) == self.total and (self.losses is not None or not self.fits_video)

    @property
    def summary(self) -> str:
        """The result in one line."""
        better = [block for block in self.blocks if block.kept]
        ratios = [math.log(max(block.error[1] / block.error[0], SMALLEST)) for block in better]
        ratio = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
        text = (
            f"{len(self.blocks)} of {self.total} blocks reconstructed, "
            f"{len(better)} are better than before, their error x {ratio:.2f} (geometric mean)"
        )
        if self.losses is not None:
            text += f"; loss on video {self.losses[0]:.4f} -> {self.losses[1]:.4f}"
        return text if self.complete else f"{text}; STOPPED EARLY, the other blocks are as they were"

    def fit(self) -> None:
        """Fit or load one group of blocks after another, then the steps on video."""
        samples: Sequence[Tensor | Sample] = ()
        source: tuple[CalibrationData, bool] | None = None
        budget = self.recipe.cache_gb * GIGABYTE / 2
        with tqdm(total=self.total + self.fits_video, desc="reconstruct", disable=self.run.silent) as bar:
            for index, group in enumerate(self.groups):
                file = self._file(f"{index:03d}")
                if (stored := _load(file, group.blocks)) is not None:
                    self.blocks += [ReconstructedBlock(**row) for row in stored]
                    bar.update(len(stored))
                    continue
                data, frames = self.data[group.scale], group.scale == "frame"
                if source != (data, frames):
                    source = (data, frames)
                    if frames:  # all of stills and clips, (1, 3, S, S) each
                        samples = [image for sample in data.samples() for image in sample.clip.images.split(1)]
                    else:
                        samples = list(data.clip_samples())
                    networks = {True: self.run.model, False: self.teacher}
                    self.features = {key: ImageFeatures(network, budget) for key, network in networks.items()}
                self._fit_group(group, samples, _seed(self.run.recipe.seed, index), bar)
                _save(file, group.blocks, [asdict(row) for row in self.blocks[-len(group.blocks) :]])
            if self.fits_video:
                bar.set_postfix_str("steps on " + ", ".join(self.scales))
                self._fit_video()
                bar.update()

    def _fit_group(self, group: Group, samples: Sequence[Tensor | Sample], seed: int, bar: tqdm[Any]) -> None:
        """Capture the calls of a group's blocks, then fit one after another."""
        bar.set_postfix_str(f"{next(iter(group.blocks))}: inputs")
        calls = capture(
            group.blocks,
            {name: self.teacher.get_submodule(name) for name in group.blocks},
            self._forward,
            samples,
            budget_bytes=self.recipe.cache_gb * GIGABYTE,
            one_call=group.scale == "frame",
        )
        for number, (name, block) in enumerate(group.blocks.items()):
            bar.set_postfix_str(name)
            row = fit_block(
                name,
                block,
                calls.pop(name),
                self.recipe,
                self.run.recipe.trainer,
                folder=self.run.folder.path,
                image_size=self.run.model.image_size,
                seed=_seed(seed, number),
                stopped=self.stopped,
            )
            if row is None:
                raise _Stopped
            self.blocks.append(row)
            bar.update()

    def _forward(self, quantized: bool, sample: Tensor | Sample) -> None:
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

    def _fit_video(self) -> None:
        file = self._file("video")
        activations = {name: q for name, q in quantizers(self.run.model) if q.role == "activation"}
        if (stored := _load(file, activations)) is not None:
            self.losses = stored[0], stored[1]
            return
        assert self.recipe.video is not None
        self.losses = fit_video(
            self.run.model,
            self.teacher,
            {scale: list(self.data[scale].clip_samples()) for scale in self.scales},
            self.recipe.video,
            self.run.recipe.trainer,
            folder=self.run.folder.path,
            stopped=self.stopped,
        )
        if self.losses is None:
            raise _Stopped
        _save(file, activations, list(self.losses))

    def _file(self, name: str) -> Path:
        """File of a finished group of blocks, or of the fit on video."""
        return self.run.folder.path / "checkpoints" / "reconstruction" / f"{name}.ckpt"


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
        log.warning("reconstruction stops: the other blocks stay as they are; Ctrl-C again ends the run")
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
