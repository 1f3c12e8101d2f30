"""Run folders as reports read them: with `report/`, in which a run saves layer statistics, clips and memory use.

Pages are made from the folder alone, so that they can be made again at any time, also while the run goes on.
"""

from __future__ import annotations

import base64
import csv
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.output import encodable, read_json, without_folders
from qsam2.recipe import Recipe, build_recipe, load_recipe
from qsam2.report.draw import Curve
from qsam2.train.loggers import CURVES

FOLDER = "report"
LAYERS, CLIPS, MEMORY, MADE = "layers.json", "clips.json", "memory.json", "made.json"
MODELS = ("float", "ptq", "quantized")
"""Keys of `metrics.json` that hold score blocks, in the order in which they are computed."""


@dataclass(frozen=True)
class SavedRun:
    """A run folder; what `report/` and the curves hold is read when it is asked for."""

    path: Path
    recipe: Recipe
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return encodable(self.path.resolve().name)

    def saved(self, name: str) -> Any:
        """Values of `LAYERS`, `CLIPS`, `MEMORY` or `MADE` (date, machine, code); None if the run saved none."""
        return read_json(self.path / FOLDER / name)

    @cached_property
    def shown_recipe(self) -> Recipe:
        """The recipe without the folders of this machine."""
        return shown_recipe(self.recipe)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Figures that training logged, by name."""
        return read_curves(self.path / CURVES)

    def media(self, name: str) -> str | None:
        """A picture or film as a data URL; None if there is no such file."""
        folder = (self.path / FOLDER).resolve()
        file = (folder / name).resolve()
        if file.parent != folder:  # the folder may come from elsewhere: nothing outside of it is shown
            return None
        kind = "video/mp4" if name.endswith(".mp4") else "image/jpeg"
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}" if file.is_file() else None

    @property
    def missing_stages(self) -> list[str]:
        """Stages of the recipe that are still to come."""
        done = self.metrics.get("seconds", {})
        left = [stage for stage in _stages(self.recipe) if stage not in done]
        return left or ([] if "bytes" in self.metrics else ["writing the model"])


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


def shown_recipe(recipe: Recipe) -> Recipe:
    """A recipe as it is shown to others: absolute paths are shortened to their last part."""
    return build_recipe(without_folders(recipe.model_dump(mode="json")))


def read_curves(folder: Path) -> dict[str, Curve]:
    """All logged figures that are finite; of steps that a resumed run repeated, the later values.

    Raises:
        UserError: a file is damaged.
    """
    values: dict[str, dict[int, float]] = {}
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in versions:
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    step = int(row["step"])
                    for name, text in row.items():
                        if text and name != "step" and math.isfinite(float(text)):
                            values.setdefault(name, {})[step] = float(text)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, the report does without") from error
    return {name: sorted(by_step.items()) for name, by_step in values.items()}


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
