"""A table whose runs are stood for by a script that writes scores at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_in import StandIn

import qsam2
from qsam2.recipe.load import merge
from qsam2.sweep import runner
from qsam2.sweep import scores as scoring
from qsam2.sweep.table import TableDefinition, TableRun, load_table, table_runs

RECIPE = Path(qsam2.__file__).parents[1] / "recipes" / "ptq_w4a4.yaml"
SMALL: dict[str, Any] = {
    "name": "small",
    "title": "A small table",
    "recipe": str(RECIPE),
    "run_seconds": 60,
    "sets": {"clips": {"data": "moving_objects:2:val", "frames": 4}, "stills": {"data": "coco:stills"}},
    "models": {"nano": {}},
    "methods": {"minmax": {}, "mse": {"quantize.weights.method": "mse"}},
    "settings": {"W4A4": {}, "W2A4": {"quantize.weights.bits": 2}},
    "starts": {"": {}, "frobenius": {"calibrate.weights": "frobenius"}},
    "runs": [{"starts": [""]}, {"methods": ["mse"], "settings": ["W4A4"], "seeds": [0, 1]}],
}
OBJECTS = [("a", "1"), ("a", "2"), ("b", "1")]
CARRY_OUT = """
folder = Path(sys.argv[sys.argv.index("--output") + 1]) / sys.argv[-1]
goes(sys.argv[-1], sys.argv[-1])
folder.joinpath("scores.json").write_text(json.dumps(told["scores"][sys.argv[-1]]))
"""


def write(folder: Path, **changes: Any) -> Path:
    """The small table, changed, as a file."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(merge(SMALL, changes), sort_keys=False))
    return file


def small_table(folder: Path, **changes: Any) -> tuple[TableDefinition, list[TableRun]]:
    """The small table and its runs, whose folders are in `folder`."""
    table = load_table(write(folder, **changes))
    return table, table_runs(table, folder / "out")


def scores(table: TableDefinition, run: TableRun, score: float, *, weights: str = "w", **more: Any) -> dict[str, Any]:
    """Scores of a run's folder whose objects score `score`, +1, +2; the still's boxes the half of that."""
    clips = {"protocol": "davis", "J&F": score + 1, "fidelity": 90.0, "per_object": blocks("J&F", score)}
    stills = {"protocol": "stills", "box_mIoU": score / 2 + 1, "per_object": blocks("box_IoU", score / 2)}
    found = {"clips": clips, "stills": {**stills, "fidelity": 80.0}}
    sets = {name: {"set": table.sets[name].model_dump(), "block": found[name]} for name in table.sets}
    kept = {"recipe": run.values, "weights": weights, "version": "1.0 (abc)", "seconds": 10.0, "error": None}
    return {**kept, "sets": sets, **more}


def blocks(key: str, score: float) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the objects: score, score + 1, score + 2."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for more, (group, item) in enumerate(OBJECTS):
        found.setdefault(group, {})[item] = {key: score + more}
    return found


class Runs(StandIn):
    """Stand-in for `qsam2 table --only`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(runner, CARRY_OUT, folder, patch)
        patch.setattr(scoring, "load_float", lambda recipe: recipe.model.size)
        patch.setattr(scoring, "weights_digest", lambda model: "w")

    def tell(self, scores: dict[str, dict[str, Any]], **how: str) -> None:
        """Set the runs' results, and how runs end that do not end well: badly, killed, long."""
        self.told.write_text(json.dumps({"scores": scores, "how": how}))
