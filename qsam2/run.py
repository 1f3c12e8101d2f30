"""One run as an object (recipe, data, models) and its folder: what was done so far, its figures and times."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import TypedDict

from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.output import read_json, write_text
from qsam2.recipe import Recipe, load_recipe, save_recipe
from qsam2.recipe.quantize import ConvertedLayer

if TYPE_CHECKING:  # inference needs no Lightning and no training data
    from lightning.pytorch.loggers import Logger

    from qsam2.data.calibration_data import CalibrationData
    from qsam2.data.clips import Source

log = logging.getLogger("qsam2")


class Metrics(TypedDict):
    """Figures of a run, `metrics.json`; the others are those of its stages."""

    seconds: dict[str, float]


class RunFolder:
    """`recipe.yaml`, `metrics.json`, `checkpoints/`, `model.safetensors`, `card.md`, `card.json`, `report.html`.

    Every figure is written when it is known, so that a killed run keeps it. Only rank 0 writes.

    Raises:
        UserError: the folder holds the run of another recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_folder
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.safetensors"
        self.stages = self.path / "checkpoints" / "stages"
        """What finished stages leave for a resumed run: the model, and the masks behind its scores."""
        self.carried_out: list[str] = []
        """Stages of this process, in order."""
        self._metrics_file = self.path / "metrics.json"
        self._begin(recipe)
        self.metrics: dict[str, Any] = {"seconds": {}}
        if self._metrics_file.is_file():
            self.metrics = read_json(self._metrics_file, Metrics, advice="remove it to run anew")

    @property
    def finished(self) -> bool:
        """True if the run came to its end, where the report is written, and still has its model and figures."""
        return all(file.is_file() for file in (self.path / "report.html", self.model, self._metrics_file))

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Say that a stage begins and how long it took; its seconds go into the metrics."""
        log.info("%s%s ...", name, f" ({what})" if what else "")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        log.info("%s: %.1f s", name, seconds)
        self.carried_out.append(name)
        self.metrics["seconds"][name] = round(self.metrics["seconds"].get(name, 0.0) + seconds, 3)
        self._save()

    def record(self, key: str, value: Any) -> None:
        """Write a figure into `metrics.json`."""
        self.metrics[key] = value
        self._save()

    def forget_stages(self) -> None:
        """Remove what only a resumed run would need."""
        if is_first_rank():
            shutil.rmtree(self.stages, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.checkpoints.rmdir()  # if nothing else is in it

    def _begin(self, recipe: Recipe) -> None:
        text = save_recipe(recipe)
        file = self.path / "recipe.yaml"
        begun = self._metrics_file.is_file() or self.checkpoints.is_dir()  # what failed earlier may be put right
        if file.is_file() and begun:
            try:
                before = load_recipe(file)  # keys that qsam2 had not yet get their defaults
            except UserError as error:
                raise UserError(f"{self.path} holds a run of another version ({error}); give output=PATH") from error
            old, new = (flat(each.model_dump(mode="json")) for each in (before, recipe))
            if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
                raise UserError(
                    f"{self.path} holds a run of another recipe (it differs in {', '.join(changed[:4])}); "
                    "give another folder with output=PATH, or the same values to resume it"
                )
        self._write(file, text)

    def _save(self) -> None:
        self._write(self._metrics_file, json.dumps(self.metrics, indent=1))

    def _write(self, file: Path, text: str) -> None:
        if is_first_rank():
            write_text(file, text)


@dataclass
class Run:
    """A recipe being carried out.

    A stage reads and changes the run, and records its figures in `folder`; without a section in the recipe it returns.
    """

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    loggers: Sequence[Logger]
    videos: list[Video]
    """Videos to score."""
    stills: list[Video]
    """Images to score with box prompts, in addition to the videos."""
    sources: list[Source]
    """Data for calibration and training."""
    model: SAM2
    teacher: SAM2 | None
    """The float model that a quantized one is compared with; None if the recipe quantizes nothing."""
    layers: list[ConvertedLayer] = field(default_factory=list)
    """Rows of the conversion table."""
    latent: dict[str, Tensor] = field(default_factory=dict)
    """Weights by layer, before rounding."""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    """Masks tracked by each scored model: "float", "ptq", "quantized"."""

    @cached_property
    def calibration(self) -> CalibrationData:
        """Stills and clips to calibrate on, drawn once."""
        from qsam2.data.calibration_data import CalibrationData

        return CalibrationData.of(self.recipe, self.sources, self.model.image_size)

    @property
    def silent(self) -> bool:
        """True if this process shows no progress bars: in a distributed run only the first rank does."""
        return not is_first_rank()

    def prepare_inference(self) -> None:
        """Put model and teacher on the run's device, in eval mode."""
        for network in (self.model, self.teacher):
            if network is not None:
                network.to(self.device).eval()


def is_first_rank() -> bool:
    """True in rank 0 of a distributed run and in a single process."""
    from lightning.pytorch.utilities import rank_zero_only  # takes a second: only for runs

    return getattr(rank_zero_only, "rank", 0) == 0


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is at work in a run folder, as one that outlived a killed sweep; keep others out.

    Ranks other than the first follow it.
    """
    if not is_first_rank():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is at work in %s: waiting for it", folder)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; make room or give output=PATH") from error
    try:
        yield
    finally:
        lock.release()


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    parts = [flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}
