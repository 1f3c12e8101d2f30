"""Results of sweeps and tables: a sweep's runs in order of the metric, a table's cells; as text and as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsam2.errors import UserError
from qsam2.evaluation.metrics.bootstrap import paired_bootstrap
from qsam2.formats.card import checkpoint_source
from qsam2.output import aligned, write_text
from qsam2.sweep.definition import Sweep
from qsam2.sweep.runner import RunState
from qsam2.sweep.scores import is_finished, read_scores
from qsam2.sweep.table import AXES, Place, TableDefinition, TableRun, float_runs

SWEEP_RESULTS = "sweep.json"
"""File in a sweep's folder: {"sweep", "metric", "goal", "runs": [best first], "best" (a command)}."""

Results = dict[str, Any]
"""Results of a table, as plain values."""


def ranked(sweep: Sweep, states: Iterable[RunState]) -> list[RunState]:
    """Runs of a sweep from best to worst; those without a metric last."""
    sign = -1 if sweep.definition.metric.goal == "maximize" else 1
    return sorted(states, key=lambda run: math.inf if run.metric is None else sign * run.metric)


def write_sweep(sweep: Sweep, runs: Sequence[RunState], folder: Path) -> str | None:
    """Write the runs, best first, into a sweep's folder; returns the command of the best one, if there is one."""
    best = sweep.command_of(dict(runs[0].values)) if runs and runs[0].metric is not None else None
    metric = sweep.definition.metric
    rows = [{"number": run.name, **{key: value for key, value in vars(run).items() if key != "name"}} for run in runs]
    results = {"sweep": sweep.name, "metric": metric.name, "goal": metric.goal, "runs": rows, "best": best}
    write_text(folder / SWEEP_RESULTS, json.dumps(results, indent=1))
    return best


def sweep_text(sweep: Sweep, runs: Sequence[RunState]) -> str:
    """The runs of a sweep as a table of plain text, in the order that is given."""
    keys = list(sweep.drawn)
    rows = [["run", sweep.definition.metric.name, "seconds", *keys, ""]]
    for run in runs:
        metric = run.state if run.metric is None else f"{run.metric:.4g}"
        seconds = "-" if run.seconds is None else f"{run.seconds:.0f}"
        rows.append([run.name, metric, seconds, *(_short(run.values.get(key)) for key in keys), run.error or ""])
    return aligned(rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_results(file: Path, table: TableDefinition) -> Results:
    """Read earlier results of a table; raises UserError if the file holds something else."""
    try:
        results = json.loads(file.read_text())
        name, _ = results["name"], [cell["digest"] for cell in results["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not hold the results of a table: give the JSON that --write wrote") from error
    if name != table.name:
        raise UserError(f"{file} holds the results of table {name!r}, not of {table.name!r}")
    return results


def valid_cells(table: TableDefinition, runs: Iterable[TableRun], earlier: Results) -> dict[Place, dict[str, Any]]:
    """The scored cells of earlier results whose recipes, data and checkpoints are those of the table."""
    cells = {tuple(cell[axis] for axis in AXES): cell for cell in earlier["cells"] if cell["sets"]}
    digests = {place: _digest(table, seeds) for place, seeds in _by_place(runs).items() if place in cells}
    return {place: cells[place] for place, digest in digests.items() if cells[place]["digest"] == digest}


def left_to_run(table: TableDefinition, runs: Sequence[TableRun], earlier: Results) -> list[TableRun]:
    """The runs of cells that earlier results do not hold with all seeds."""
    valid, places = valid_cells(table, runs, earlier), _by_place(runs)
    complete = {place for place, cell in valid.items() if len(cell["seeds"]) == len(places[place])}
    return [run for run in runs if run.place not in complete]


def collect(table: TableDefinition, runs: Sequence[TableRun], command: str, earlier: Results | None = None) -> Results:
    """The results of a table so far; `command` regenerates them.

    Scores of several seeds are averaged per object before the paired bootstrap; `std` is their standard deviation.

    Args:
        earlier: results whose valid cells are used if the runs' folders have fewer seeds (see `valid_cells`).

    Raises:
        UserError: a float model is not scored.
    """
    valid = valid_cells(table, runs, earlier) if earlier else {}
    reference = {place[0]: earlier["float"][place[0]] for place in valid} if earlier else {}
    floats = {}
    for run in float_runs(runs):
        scores = read_scores(run)
        if scores is not None and is_finished(table, run):
            floats[run.model] = scores
            reference[run.model] = {name: _score(scores["sets"][name]["block"]) for name in table.sets}
        elif run.model not in reference:
            error = f": {scores['error']}" if scores and scores["error"] else ""
            raise UserError(
                f"table {table.name}: the float model {run.model!r} is not scored{error}; run the table again"
            )
    begun = [scores for run in runs if (scores := read_scores(run))]
    finished = [scores for scores in begun if scores["sets"].keys() >= table.sets.keys() and not scores["error"]]
    seconds = [scores["seconds"] for scores in finished]
    versions = {scores["version"] for scores in [*floats.values(), *finished]}
    sets = {name: _set(table, name, scores) for scores in floats.values() for name in table.sets}
    if earlier and valid:
        versions |= {*earlier["versions"]}
        sets = earlier["sets"]
        seconds = seconds or [earlier["runs"]["median_seconds"]]
    cells = []
    for place, seeds in _by_place(runs).items():
        cell = _cell(table, place, seeds, floats.get(place[0]))
        kept = valid.get(place)
        cells.append(kept if kept and len(kept["seeds"]) > len(cell["seeds"]) else cell)
    return {
        "name": table.name,
        "title": table.title,
        "command": command,
        "budget": _budget(runs),
        "runs": {
            "all": len(runs),
            "finished": sum(len(cell["seeds"]) for cell in cells),
            "failed": sum(cell["failed"] for cell in cells),
            "median_seconds": statistics.median(seconds) if seconds else None,
        },
        "versions": sorted(versions),
        "sets": sets,
        "settings": list(table.settings),
        "float": reference,
        "cells": cells,
    }


def _by_place(runs: Iterable[TableRun]) -> dict[Place, list[TableRun]]:
    places: dict[Place, list[TableRun]] = {}
    for run in runs:
        places.setdefault(run.place, []).append(run)
    return places


def _digest(table: TableDefinition, runs: Sequence[TableRun]) -> str:
    """SHA-256 of everything that determines a cell's scores, except for the version of qsam2."""
    causes = {
        "recipes": [run.values for run in runs],
        "source": checkpoint_source(runs[0].recipe),
        "sets": {name: scored.model_dump() for name, scored in table.sets.items()},
    }
    return hashlib.sha256(json.dumps(causes, sort_keys=True).encode()).hexdigest()


def _cell(table: TableDefinition, place: Place, runs: Sequence[TableRun], reference: Any) -> dict[str, Any]:
    finished = [run for run in runs if is_finished(table, run)]
    blocks = [read_scores(run)["sets"] for run in finished]  # type: ignore[index]
    sets = {
        name: _against([block[name]["block"] for block in blocks], reference["sets"][name]["block"])
        for name in (table.sets if blocks else ())
    }
    failed = sum(bool((scores := read_scores(run)) and scores["error"]) for run in runs)
    return {
        **dict(zip(AXES, place, strict=True)),
        "digest": _digest(table, runs),
        "seeds": [run.recipe.seed for run in finished],
        "failed": failed,
        "sets": sets,
    }


def _against(blocks: Sequence[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """Mean score and fidelity over seeds, and the difference to float with its 95 % interval."""
    key = "box_IoU" if reference["protocol"] == "stills" else "J&F"
    mean = {
        group: {item: {key: float(np.mean([b["per_object"][group][item][key] for b in blocks]))} for item in items}
        for group, items in reference["per_object"].items()
    }
    versus = paired_bootstrap(mean, reference["per_object"], key=key)
    scores = [_score(block) for block in blocks]
    return {
        "score": round(statistics.mean(scores), 3),
        "std": round(statistics.stdev(scores), 3) if len(scores) > 1 else None,
        "fidelity": round(statistics.mean(block["fidelity"] for block in blocks), 3),
        **{part: round(versus[part], 3) for part in ("difference", "low", "high")},
    }


def _score(block: dict[str, Any]) -> float:
    return round(block["box_mIoU" if block["protocol"] == "stills" else "J&F"], 3)


def _set(table: TableDefinition, name: str, scores: dict[str, Any]) -> dict[str, Any]:
    block = scores["sets"][name]["block"]
    objects = sum(len(items) for items in block["per_object"].values())
    return {**table.sets[name].model_dump(), "protocol": block["protocol"], "objects": objects}


def _budget(runs: Sequence[TableRun]) -> dict[str, Any]:
    """Data, calibration and training settings that are the same for all runs."""
    budgets = []
    for recipe in (run.recipe for run in runs):
        budget = {"data": list(recipe.data.train), "calibration clips": recipe.calibrate.clips}
        budget["frames a calibration clip"] = recipe.calibrate.num_frames
        budget["calibration stills"] = recipe.calibrate.stills
        if recipe.train is not None:
            budget["steps"] = recipe.trainer.max_steps
            budget["clips a step"] = recipe.data.batch_size * recipe.trainer.accumulate
            budget["frames a clip"] = recipe.data.num_frames
        budgets.append(budget)
    return {key: value for key, value in budgets[0].items() if all(other.get(key) == value for other in budgets)}
