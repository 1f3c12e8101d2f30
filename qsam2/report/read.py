"""Run folders as reports read them.

A run saves what its report needs (layer statistics, clips, memory use) in `report/` of its folder. The page is made
from the folder alone, so that it can be made again at any time, also while the run goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.output import read_json, write_bytes, write_text
from qsam2.recipe import Recipe, load_recipe
from qsam2.report.curves import Curve, read_curves
from qsam2.train.loggers import CURVES

FOLDER = "report"
LAYERS, CLIPS, MEMORY = "layers.json", "clips.json", "memory.json"
MODELS = ("float", "ptq", "quantized")
"""Keys of `metrics.json` that hold score blocks, in the order in which they are computed."""


def save_json(run: Path, name: str, values: Any) -> None:
    """Write plain values into a run folder; raises UserError if the disk is full."""
    write_text(run / FOLDER / name, json.dumps(values))


def save_media(run: Path, name: str, data: bytes) -> None:
    """Write a picture or a film into a run folder; raises UserError if the disk is full."""
    write_bytes(run / FOLDER / name, data)


def load_json(run: Path, name: str) -> Any:
    """Values that `save_json` wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    return read_json(run / FOLDER / name)


@dataclass(frozen=True)
class SavedRun:
    """A run folder, read lazily; `layers`, `clips`, `memory` are None if the run saved none."""

    path: Path
    recipe: Recipe
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @cached_property
    def layers(self) -> dict[str, Any] | None:
        """Output of `measure_layers`."""
        return load_json(self.path, LAYERS)

    @cached_property
    def clips(self) -> dict[str, Any] | None:
        """Index that `save_clips` wrote."""
        return load_json(self.path, CLIPS)

    @cached_property
    def memory(self) -> dict[str, Any] | None:
        """Output of `memory_use`."""
        return load_json(self.path, MEMORY)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Figures that training logged, by name."""
        return read_curves(self.path / CURVES)

    def media(self, name: str) -> bytes | None:
        """Content of a picture or film; None if there is no such file."""
        file = self.path / FOLDER / name
        return file.read_bytes() if file.is_file() else None

    @property
    def missing_stages(self) -> list[str]:
        """Stages of the recipe that are still to come."""
        done = self.metrics.get("seconds", {})
        left = [stage for stage in _stages(self.recipe) if stage not in done]
        if not left and "bytes" not in self.metrics:
            left = ["writing the model"]
        return left

    @property
    def final(self) -> dict[str, Any] | None:
        """The score block of the model that the run ships."""
        return self.metrics.get("float" if self.recipe.quantize is None else "quantized")


def read_run(path: Path) -> SavedRun:
    """A run folder, finished or not.

    Raises:
        UserError: no run folder, one of another version, or a damaged file in it.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist or is no folder: give run folders, as runs/demo")
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run folder, it holds no recipe.yaml: give the `output` of a run, as runs/demo")
    try:
        recipe = load_recipe(path / "recipe.yaml")
    except UserError as error:
        raise UserError(f"{path} holds a run of another version ({error}): carry it out anew to report it") from error
    metrics = read_json(path / "metrics.json") or {}
    if not isinstance(metrics, dict) or not isinstance(metrics.get("seconds", {}), dict):
        raise UserError(f"{path / 'metrics.json'} holds no metrics of a run: copy it again, or carry out the run anew")
    return SavedRun(path, recipe, metrics)


def _stages(recipe: Recipe) -> list[str]:
    """Stages whose seconds a finished run has recorded, in their order."""
    calibrate = recipe.calibrate

    def score(name: str) -> list[str]:
        return [f"score {name}", *([f"score {name} on stills"] if recipe.evaluate.stills else [])]

    if recipe.quantize is None:
        return [*(["train"] if recipe.train else []), *score("float")]
    return [
        *(["allocate bits"] if recipe.quantize.allocate else []),
        *(["calibrate weights"] if calibrate.weights else []),
        *(["smooth"] if calibrate.smooth else []),
        "convert",
        *score("float"),
        "calibrate",
        *(["round weights"] if calibrate.rounding else []),
        *(["reconstruct"] if recipe.reconstruct else []),
        *(score("ptq") if recipe.train is None or recipe.evaluate.after_calibration else []),
        *(["train", *score("quantized")] if recipe.train else []),
    ]
