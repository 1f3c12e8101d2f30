"""A sweep whose runs are stood for by a script that writes metrics at once."""

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
from qsam2.sweep.definition import Sweep, load_sweep

RECIPES = Path(qsam2.__file__).parents[1] / "recipes"
WEIGHTS, ACTIVATIONS = "quantize.weights.bits", "quantize.activations.bits"
COMMAND = ["${env}", "${interpreter}", "${program}", str(RECIPES / "ptq_w4a4.yaml"), "seed=1", "${args_no_hyphens}"]
GRID: dict[str, Any] = {
    "name": "small",
    "description": "Bits; 60 s a run",
    "program": "train.py",
    "command": COMMAND,
    "method": "grid",
    "metric": {"name": "quantized/J&F", "goal": "maximize"},
    "parameters": {WEIGHTS: {"values": [2, 4]}, ACTIVATIONS: {"values": [4, 6, 8]}},
}
RANGES = {WEIGHTS: {"min": 2, "max": 8}, "calibrate.smooth": {"min": 0.0, "max": 1.0}}
TRAIN = """
given = dict(word.split("=", 1) for word in sys.argv[3:])
folder, name = Path(json.loads(given["output"])), given["name"]
how = goes(name, json.dumps(given))
if how == "without":
    sys.exit(0)
if how == "damaged":
    (folder / "metrics.json").write_text('{"quantized": {"J&F')
    sys.exit(0)
if isinstance(how, list):  # a curve, whose rows come one by one
    (folder / "curves" / "version_0").mkdir(parents=True)
    with (folder / "curves" / "version_0" / "metrics.csv").open("w") as file:
        file.write("step,loss\\n")
        for step, loss in enumerate(how):
            file.write(f"{step},{loss}\\n")
            file.flush()
            time.sleep(0.1)
bits = float(given.get("quantize.weights.bits", 0)) + 0.1 * float(given.get("quantize.activations.bits", 0))
(folder / "metrics.json").write_text(json.dumps({"quantized": {"J&F": bits}}))
"""


def write(folder: Path, **changes: Any) -> Path:
    """The small grid, changed, as a file; `parameters` are replaced, all else is merged."""
    values = merge(GRID, changes)
    if "parameters" in changes:
        values["parameters"] = changes["parameters"]
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def small_sweep(folder: Path, **changes: Any) -> Sweep:
    return load_sweep(write(folder, **changes))


class Runs(StandIn):
    """Stand-in for `qsam2 train`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(runner, TRAIN, folder, patch)
        patch.setattr(runner, "POLL_S", 0.02)
        self.tell({})

    def tell(self, how: dict[str, Any]) -> None:
        """How runs, by name, will go: badly, killed, long, damaged, without a metric, or with these losses."""
        self.told.write_text(json.dumps({"how": how}))

    def given(self) -> list[dict[str, str]]:
        """Arguments of the runs begun since the last call, by key."""
        return [json.loads(line) for line in self.begun()]

    def names(self) -> list[str]:
        """Names of the runs since the last call."""
        return [given["name"] for given in self.given()]
