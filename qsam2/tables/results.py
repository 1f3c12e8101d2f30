"""What the runs of a table found, as one small JSON: a cell for each method, start and setting, on each set."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from qsam2.errors import UserError
from qsam2.metrics.bootstrap import paired_bootstrap
from qsam2.tables.definition import TableDefinition, TableRun, float_runs
from qsam2.tables.scores import is_finished, read_scores

Results = dict[str, Any]


def collect(table: TableDefinition, runs: Sequence[TableRun], command: str) -> Results:
    """The results of a table so far, as plain values; `command` is what regenerates them.

    Scores of several seeds are averaged an object before the paired bootstrap, and their standard deviation is given.

    Raises:
        UserError: a float model is not scored.
    """
    floats = {}
    for run in float_runs(runs):
        scores = read_scores(run)
        if scores is None or not is_finished(table, run):
            error = f": {scores['error']}" if scores and scores["error"] else ""
            raise UserError(
                f"table {table.name}: the float model {run.model!r} is not scored{error}; run the table again"
            )
        floats[run.model] = scores
    cells: dict[tuple[str, ...], list[TableRun]] = {}
    for run in runs:
        cells.setdefault((run.model, run.method, run.start, run.setting), []).append(run)
    every = [scores for run in runs if (scores := read_scores(run))]
    finished = [scores for scores in every if scores["sets"].keys() >= table.sets.keys() and not scores["error"]]
    return {
        "name": table.name,
        "title": table.title,
        "command": command,
        "budget": _budget(runs),
        "runs": {
            "all": len(runs),
            "finished": len(finished),
            "failed": sum(bool(scores["error"]) for scores in every),
            "median_seconds": statistics.median(each["seconds"] for each in finished) if finished else None,
        },
        "versions": sorted({scores["version"] for scores in [*floats.values(), *finished]}),
        "sets": {name: _set(table, name, next(iter(floats.values()))) for name in table.sets},
        "settings": list(table.settings),
        "float": {
            model: {name: _score(scores["sets"][name]["block"]) for name in table.sets}
            for model, scores in floats.items()
        },
        "cells": [_cell(table, names, same, floats[names[0]]) for names, same in cells.items()],
    }


def _cell(table: TableDefinition, names: tuple[str, ...], runs: Sequence[TableRun], reference: Any) -> dict[str, Any]:
    finished = [run for run in runs if is_finished(table, run)]
    blocks = [read_scores(run)["sets"] for run in finished]  # type: ignore[index]
    sets = {
        name: _against([each[name]["block"] for each in blocks], reference["sets"][name]["block"])
        for name in (table.sets if blocks else ())
    }
    failed = sum(bool((scores := read_scores(run)) and scores["error"]) for run in runs)
    places = dict(zip(("model", "method", "start", "setting"), names, strict=True))
    return {**places, "seeds": [run.recipe.seed for run in finished], "failed": failed, "sets": sets}


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
