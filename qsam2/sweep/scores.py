"""The plan of a table: its runs, each scored on all sets in a process of its own, with its scores in its folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from qsam2.errors import UserError
from qsam2.evaluation.scoring import score_against, weights_digest
from qsam2.loading import load_float, load_model
from qsam2.output import code_version, write_text
from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe
from qsam2.run import is_first_rank
from qsam2.sweep.runner import Job, Plan, RunFailed, RunState
from qsam2.sweep.table import TableDefinition, TableRun, float_runs

SCORES = "scores.json"
"""File in a run's folder: {"recipe" (keys that the table sets), "weights" (hash of the float model), "version",
"seconds", "error", "sets": {SET: {"set", "block"}}}."""

log = logging.getLogger("qsam2")


class TablePlan(Plan):
    """The runs of a table: float models first, then its own in order.

    Args:
        command: the arguments of `qsam2` that carry out one run, without its name.
    """

    def __init__(self, table: TableDefinition, runs: Sequence[TableRun], folder: Path, command: Sequence[str]) -> None:
        self.table, self.folder, self.command = table, folder, command
        self.floats, self.runs = float_runs(runs), list(runs)
        self.name, self.total = f"table {table.name}", len(self.floats) + len(self.runs)
        self.run_seconds = table.run_seconds

    def states(self) -> list[RunState]:
        """All runs, by their folders; raises UserError as `is_finished` does."""
        return [self._state(run) for run in [*self.floats, *self.runs]]

    def stages(self) -> Iterator[Iterator[Job]]:
        """Float models, whose scores the others read; then the others. Raises UserError as `is_finished` does."""
        weights = {run.model: weights_digest(load_float(run.recipe)) for run in self.floats}
        pending = [
            [run for run in runs if not is_finished(self.table, run, weights[run.model])]
            for runs in (self.floats, self.runs)
        ]
        for runs in pending:
            yield iter([Job(run.name, run.recipe.run_folder, [*self.command, "--only", run.name], run) for run in runs])

    def end(self, job: Job, seconds: float, error: str | None, stopped: bool) -> str:
        """Write an error into the scores; all else was written by the run."""
        if error:
            save_scores(job.item, begin_scores(job.item, error))
            raise RunFailed(error)
        return "scored"

    def _state(self, run: TableRun) -> RunState:
        scores = read_scores(run)
        if is_finished(self.table, run):
            return RunState(run.name, "finished", seconds=scores["seconds"])  # type: ignore[index]
        if scores is None:
            return RunState(run.name, "to come")
        return RunState(run.name, "failed" if scores["error"] else "cut off", error=scores["error"])


def read_scores(run: TableRun) -> dict[str, Any] | None:
    """A run's scores so far; None before it has begun."""
    file = run.recipe.run_folder / SCORES
    return json.loads(file.read_text()) if file.is_file() else None


def is_finished(table: TableDefinition, run: TableRun, weights: str | None = None) -> bool:
    """True if a run is scored on all sets.

    Raises:
        UserError: its folder holds a run of another recipe, of other data or, with `weights`, of another float model.
    """
    scores = read_scores(run)
    begun = scores is not None and (scores["sets"] or (run.recipe.run_folder / "metrics.json").is_file())
    if scores is None or not begun:  # a run that failed earlier may be corrected in the table
        return False
    sets = {name: scored.model_dump() for name, scored in table.sets.items()}
    changed = {
        "recipe": scores["recipe"] != run.values,
        "data": any(scored["set"] != sets.get(name, scored["set"]) for name, scored in scores["sets"].items()),
        "float weights": weights is not None and scores["weights"] != weights,
    }
    if any(changed.values()):
        what = " and ".join(key for key, differs in changed.items() if differs)
        raise UserError(
            f"{run.recipe.run_folder} holds a run that differs from the table's (its {what}): remove the folder to run "
            "it again, or give another --output"
        )
    return scores["sets"].keys() >= table.sets.keys() and scores["error"] is None


def score_run(table: TableDefinition, run: TableRun) -> None:
    """Carry out one run in this process and score it on all sets; what is finished is not repeated.

    Raises:
        UserError: see `run_recipe`, `score_against` and `is_finished`.
    """
    folder = run.recipe.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    # A run of a killed table may not have ended yet; other ranks follow the first
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
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # tens of MB per run, of no use to a finished one


def begin_scores(run: TableRun, error: str | None = None) -> dict[str, Any]:
    """A run's scores so far, with its recipe, the code's version and the error."""
    scores = read_scores(run) or {"weights": None, "seconds": 0.0, "sets": {}}
    return scores | {"recipe": run.values, "version": code_version(), "error": error}


def save_scores(run: TableRun, scores: dict[str, Any]) -> None:
    """Write a run's scores into its folder."""
    if is_first_rank():
        write_text(run.recipe.run_folder / SCORES, json.dumps(scores, indent=1))


def _add(table: TableDefinition, run: TableRun, scores: dict[str, Any], name: str, block: dict[str, Any]) -> None:
    scores["sets"][name] = {"set": table.sets[name].model_dump(), "block": block}
    save_scores(run, scores)
