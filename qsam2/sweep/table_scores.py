"""One run of a table: carried out, scored on all sets, its scores kept beside it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import nullcontext
from typing import Any

from filelock import FileLock

from qsam2.errors import UserError
from qsam2.evaluation.float_scores import weights_digest
from qsam2.evaluation.scoring import score_against
from qsam2.loading import load_float, load_model
from qsam2.output import code_version, write_text
from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe
from qsam2.run_folder import is_first_rank
from qsam2.sweep.table_definition import TableDefinition, TableRun

SCORES = "scores.json"
"""In a run's folder: {"recipe" (what was given), "weights" (hash of the float model), "version", "seconds", "error",
"sets": {SET: {"set", "block"}}}."""

log = logging.getLogger("qsam2")


def read_scores(run: TableRun) -> dict[str, Any] | None:
    """What a run's folder holds of its scores; None before it began."""
    file = run.recipe.run_folder / SCORES
    return json.loads(file.read_text()) if file.is_file() else None


def is_finished(table: TableDefinition, run: TableRun, weights: str | None = None) -> bool:
    """Whether a run is scored on all sets.

    Raises:
        UserError: its folder holds another recipe's run, one scored on other data, or, where `weights` is given, one
            that started from other weights.
    """
    scores = read_scores(run)
    begun = scores is not None and (scores["sets"] or (run.recipe.run_folder / "metrics.json").is_file())
    if scores is None or not begun:  # what failed earlier may be put right
        return False
    given = {name: each.model_dump() for name, each in table.sets.items()}
    changed = {
        "recipe": scores["recipe"] != run.values,
        "data": any(scored["set"] != given.get(name, scored["set"]) for name, scored in scores["sets"].items()),
        "float weights": weights is not None and scores["weights"] != weights,
    }
    if any(changed.values()):
        what = " and ".join(key for key, differs in changed.items() if differs)
        raise UserError(
            f"{run.recipe.run_folder} holds a run that differs from the table's (its {what}): remove the folder to run "
            "it again, or give another --output"
        )
    return scores["sets"].keys() >= table.sets.keys() and scores["error"] is None


def carry_out(table: TableDefinition, run: TableRun) -> None:
    """Run a recipe and score it on all sets, or what is left of that.

    Raises:
        UserError: as the pipeline, the evaluation and `is_finished` do.
    """
    folder = run.recipe.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    # A run that outlived a killed table may still be at it; other ranks follow the first
    with FileLock(folder / ".lock") if is_first_rank() else nullcontext():
        reference = load_float(run.recipe)
        weights = weights_digest(reference)
        if is_finished(table, run, weights):
            return
        scores = begin_scores(run) | {"weights": weights}
        save_scores(run, scores)
        quantized = run.recipe.quantize is not None
        first = next(iter(table.sets))
        if quantized and first not in scores["sets"]:
            metrics = run_recipe(run.recipe)
            scores["seconds"] += sum(metrics["seconds"].values())
            _add(table, run, scores, first, metrics["quantized"])
        model = load_model(folder)[0] if quantized else reference
        for name, scored in table.sets.items():
            if name in scores["sets"]:
                continue
            started = time.perf_counter()
            recipe = build_recipe(run.recipe.model_dump(mode="json"), scored.overrides)
            block = score_against(model, reference if quantized else None, recipe)
            scores["seconds"] += time.perf_counter() - started
            _add(table, run, scores, name, block)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # tens of MB a run, to resume what is finished


def begin_scores(run: TableRun, error: str | None = None) -> dict[str, Any]:
    """A run's scores so far, with what is known before it is carried out."""
    scores = read_scores(run) or {"weights": None, "seconds": 0.0, "sets": {}}
    return scores | {"recipe": run.values, "version": code_version(), "error": error}


def save_scores(run: TableRun, scores: dict[str, Any]) -> None:
    """Write a run's scores into its folder."""
    if is_first_rank():
        write_text(run.recipe.run_folder / SCORES, json.dumps(scores, indent=1))


def _add(table: TableDefinition, run: TableRun, scores: dict[str, Any], name: str, block: dict[str, Any]) -> None:
    scores["sets"][name] = {"set": table.sets[name].model_dump(), "block": block}
    save_scores(run, scores)
