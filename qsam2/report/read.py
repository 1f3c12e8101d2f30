"""Run folders as reports read them: with `report/`, in which a run saves layer statistics, clips and memory use.

Pages are made from the folder alone, so that they can be made again at any time, also while the run goes on.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qsam2.data.unlabelled import is_unlabelled
from qsam2.errors import NOT_THIS_JSON, UserError, short
from qsam2.output import encodable, listed, read_json
from qsam2.recipe import Recipe, build_recipe, load_recipe
from qsam2.recipe.portable import portable
from qsam2.report.draw import Curve
from qsam2.train.loggers import CURVES

FOLDER = "report"
LAYERS, CLIPS, MEMORY, MADE = "layers.json", "clips.json", "memory.json", "made.json"
KINDS = {".mp4": "video/mp4", ".jpg": "image/jpeg"}
MAX_MEDIA_BYTES = 2**26
"""Size of a film or picture that a page takes in; those of a run have some 100 kB."""
MOST = 1e30
"""Values that an axis still shows."""
MODELS = ("float", "ptq", "quantized")
"""Keys of `metrics.json` that hold score blocks, in the order in which they are computed."""


@dataclass(frozen=True)
class SavedRun:
    """A run folder; what `report/` and the curves hold is read when it is asked for."""

    path: Path
    recipe: Recipe  # without the folders of the machine that made the run
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return encodable(self.path.resolve().name)

    def saved(self, name: str) -> Any:
        """Values of `LAYERS`, `CLIPS`, `MEMORY` or `MADE` (date, machine, code); None if the run saved none."""
        return read_json(self.path / FOLDER / name)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Finite figures that training logged, by name: those of a diverged run end where it diverged."""
        curves = read_curves(self.path / CURVES)
        return {name: [point for point in curve if abs(point[1]) < MOST] for name, curve in curves.items()}

    def media(self, name: str) -> str | None:
        """A picture or film in `report/` as a data URL; None if there is no such file there, or one beyond all use."""
        kind, folder = KINDS.get(Path(name).suffix), (self.path / FOLDER).resolve()
        if kind is None or Path(name).name != name or not os.path.isfile(folder / name):
            return None
        file = (folder / name).resolve()  # a link may lead elsewhere
        if file.parent != folder or file.stat().st_size > MAX_MEDIA_BYTES:
            return None
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"

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
    elsewhere = build_recipe(portable(recipe.model_dump(mode="json")))  # pages are sent to others
    return SavedRun(path, elsewhere, metrics)


@contextlib.contextmanager
def as_runs_write(runs: Sequence[SavedRun]) -> Iterator[None]:
    """Context manager: drawing run folders that may come from elsewhere.

    Raises:
        UserError: their figures are of another shape than runs write.
    """
    try:
        yield
    except (*NOT_THIS_JSON, ArithmeticError, TemplateError) as error:
        folders, reason = listed([str(run.path) for run in runs]), f"{type(error).__name__}: {short(error)}"
        raise UserError(
            f"{folders}: the figures are not as a run writes them ({reason}): copy the folder again, or carry out the "
            "run anew"
        ) from error


def read_curves(folder: Path) -> dict[str, Curve]:
    """All logged figures that are finite; of steps that a resumed run repeated, the later values.

    Raises:
        UserError: a file is damaged.
    """
    values: dict[str, dict[int, float]] = {}
    files = [path for path in folder.glob("version_*/metrics.csv") if path.parent.name[len("version_") :].isdecimal()]
    for path in sorted(files, key=lambda path: int(path.parent.name[len("version_") :])):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if not 0 <= (step := int(row["step"])) < 2**53:
                        raise ValueError(f"step {step}")
                    for name, text in row.items():
                        if text and name != "step" and math.isfinite(float(text)):
                            values.setdefault(name, {})[step] = float(text)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is damaged ({short(error)}): remove it, the report does without") from error
    return {name: sorted(by_step.items()) for name, by_step in values.items()}


def _stages(recipe: Recipe) -> list[str]:
    """Stages whose seconds a finished run has recorded, in their order."""
    calibrate = recipe.calibrate

    def score(name: str) -> list[str]:
        return [f"score {name}", *([f"score {name} on stills"] if recipe.evaluate.stills else [])]

    if recipe.quantize is None:
        return [*(["train"] if recipe.train else []), *score("float")]
    return [
        *(["prompt"] if any(map(is_unlabelled, (*recipe.data.train, recipe.data.scored))) else []),
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
