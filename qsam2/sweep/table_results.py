"""What the runs of a table found, as one small JSON: a cell for each method, start and setting, on each set."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsam2.errors import UserError
from qsam2.evaluation.metrics.bootstrap import paired_bootstrap
from qsam2.formats.card import checkpoint_source
from qsam2.sweep.table_definition import AXES, Place, TableDefinition, TableRun, float_runs
from qsam2.sweep.table_scores import is_finished, read_scores

Results = dict[str, Any]


def read_results(file: Path, table: TableDefinition) -> Results:
    """The results of a table that were written earlier.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        results = json.loads(file.read_text())
        name, _ = results["name"], [cell["digest"] for cell in results["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not hold the results of a table: give the JSON that --write wrote") from error
    if name != table.name:
        raise UserError(f"{file} holds the results of table {name!r}, not of {table.name!r}")
    return results


def cells_that_hold(table: TableDefinition, runs: Iterable[TableRun], earlier: Results) -> dict[Place, dict[str, Any]]:
    """The cells of earlier results whose recipes, data and checkpoints are those of the table, with what has ended."""
    cells = {tuple(cell[axis] for axis in AXES): cell for cell in earlier["cells"] if cell["sets"]}
    digests = {place: _digest(table, same) for place, same in _by_place(runs).items() if place in cells}
    return {place: cells[place] for place, digest in digests.items() if cells[place]["digest"] == digest}


def left_to_run(table: TableDefinition, runs: Sequence[TableRun], earlier: Results) -> list[TableRun]:
    """The runs of cells that earlier results do not hold with all seeds."""
    held = cells_that_hold(table, runs, earlier)
    ended = {
        place for place, same in _by_place(runs).items() if place in held and len(held[place]["seeds"]) == len(same)
    }
    return [run for run in runs if run.place not in ended]


def collect(table: TableDefinition, runs: Sequence[TableRun], command: str, earlier: Results | None = None) -> Results:
    """The results of a table so far, as plain values; `command` is what regenerates them.

    Scores of several seeds are averaged an object before the paired bootstrap, and their standard deviation is given.

    Args:
        earlier: results whose cells stand where they hold (see `cells_that_hold`) and the runs' folders have less.

    Raises:
        UserError: a float model is not scored.
    """
    held = cells_that_hold(table, runs, earlier) if earlier else {}
    reference = {place[0]: earlier["float"][place[0]] for place in held} if earlier else {}
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
    every = [scores for run in runs if (scores := read_scores(run))]
    finished = [scores for scores in every if scores["sets"].keys() >= table.sets.keys() and not scores["error"]]
    seconds = [each["seconds"] for each in finished]
    versions = {scores["version"] for scores in [*floats.values(), *finished]}
    sets = {name: _set(table, name, scores) for scores in floats.values() for name in table.sets}
    if earlier and held:
        versions |= {*earlier["versions"]}
        sets = earlier["sets"]
        seconds = seconds or [earlier["runs"]["median_seconds"]]
    cells = []
    for place, same in _by_place(runs).items():
        cell = _cell(table, place, same, floats.get(place[0]))
        cells.append(held[place] if place in held and len(held[place]["seeds"]) > len(cell["seeds"]) else cell)
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
    """SHA-256 of all that a cell's scores follow from but for the version of qsam2."""
    meant = {
        "recipes": [run.values for run in runs],
        "source": checkpoint_source(runs[0].recipe),
        "sets": {name: scored.model_dump() for name, scored in table.sets.items()},
    }
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def _cell(table: TableDefinition, place: Place, runs: Sequence[TableRun], reference: Any) -> dict[str, Any]:
    finished = [run for run in runs if is_finished(table, run)]
    blocks = [read_scores(run)["sets"] for run in finished]  # type: ignore[index]
    sets = {
        name: _against([each[name]["block"] for each in blocks], reference["sets"][name]["block"])
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
    """Mean score and fidelity of the seeds, and the difference to float with its 95 % interval."""
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
    """What is the same for all runs of what they may spend."""
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
