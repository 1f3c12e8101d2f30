"""The plan of a table: its runs, each scored on all sets in a process of its own, with its scores in its folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from qsam2.errors import UserError
from qsam2.evaluation.scoring import score_against, weights_digest
from qsam2.loading import load_float, load_model
from qsam2.output import code_version, read_json, write_text
from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe
from qsam2.run import alone_in, is_first_rank
from qsam2.sweep.runner import Job, Plan, RunFailed, RunState
from qsam2.sweep.table import TableDefinition, TableRun, float_runs

SCORES = "scores.json"

log = logging.getLogger("qsam2")


class TablePlan(Plan):
    """The runs of a table: float models first, then its own in order; `command` and --only NAME carry out one."""

    def __init__(self, table: TableDefinition, runs: Sequence[TableRun], folder: Path, command: Sequence[str]) -> None:
        self.table, self.folder, self.command = table, folder, command
        self.floats, self.runs = float_runs(runs), list(runs)
        self.name, self.total = f"table {table.name}", len(self.floats) + len(self.runs)
        self.run_seconds = table.run_seconds

    def states(self) -> list[RunState]:
        """All runs, by their folders; raises UserError as `is_finished` does."""
        states = []
        for run in [*self.floats, *self.runs]:
            scores = read_scores(run)
            if scores is None:
                states.append(RunState(run.name, "to come"))
            elif is_finished(self.table, run):
                states.append(RunState(run.name, "finished", seconds=scores["seconds"]))
            else:
                state = "failed" if scores["error"] else "cut off"
                states.append(RunState(run.name, state, error=scores["error"]))
        return states

    def stages(self) -> Iterator[Iterator[Job]]:
        """Float models, whose scores the others read; then the others. Raises UserError as `is_finished` does."""
        weights = {run.place.model: weights_digest(load_float(run.recipe)) for run in self.floats}
        stages = [
            [
                Job(run.name, run.recipe.run_folder, [*self.command, "--only", run.name], run)
                for run in runs
                if not is_finished(self.table, run, weights[run.place.model])
            ]
            for runs in (self.floats, self.runs)
        ]
        yield from map(iter, stages)

    def end(self, job: Job, seconds: float, error: str | None, stopped: bool) -> str:
        """Write an error into the scores; all else was written by the run."""
        if error:
            save_scores(job.item, begin_scores(job.item, error))
            raise RunFailed(error)
        return "scored"


class _ScoredSet(TypedDict):
    set: dict[str, Any]
    block: dict[str, Any]


class Scores(TypedDict):
    """File in a run's folder: "recipe" has the keys that the table sets, "weights" the hash of the float model."""

    recipe: dict[str, Any]
    weights: str | None
    version: str
    seconds: float
    error: str | None
    sets: dict[str, _ScoredSet]


def read_scores(run: TableRun) -> dict[str, Any] | None:
    """A run's scores so far; None before it has begun."""
    return read_json(run.recipe.run_folder / SCORES, Scores, advice="remove it to run again")


def is_finished(table: TableDefinition, run: TableRun, weights: str | None = None) -> bool:
    """True if a run is scored on all sets.

    Raises UserError if its folder holds a run of another recipe, of other data or, with `weights`, of another model.
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
    """Carry out one run in this process and score it on all sets; what is finished is not repeated."""
    folder = run.recipe.run_folder
    with alone_in(folder):  # a run of a killed table may not have ended yet
        reference = load_float(run.recipe)
        weights = weights_digest(reference)
        if is_finished(table, run, weights):
            return
        scores = begin_scores(run) | {"weights": weights}
        save_scores(run, scores)
        quantized, model = run.recipe.quantize is not None, None
        for name, scored in table.sets.items():
            if name in scores["sets"]:
                continue
            if quantized and not scores["sets"]:  # a run scores the first set itself
                metrics = run_recipe(run.recipe)
                seconds, block = sum(metrics["seconds"].values()), metrics["quantized"]
            else:
                model = model or (load_model(folder)[0] if quantized else reference)
                started = time.perf_counter()
                recipe = build_recipe(run.recipe.model_dump(mode="json"), scored.overrides)
                block = score_against(model, reference if quantized else None, recipe)
                seconds = time.perf_counter() - started
            scores["seconds"] += seconds
            scores["sets"][name] = {"set": scored.model_dump(), "block": block}
            save_scores(run, scores)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # tens of MB per run, of no use to a finished one


def begin_scores(run: TableRun, error: str | None = None) -> dict[str, Any]:
    """A run's scores so far, with its recipe, the code's version and the error."""
    scores = read_scores(run) or {"weights": None, "seconds": 0.0, "sets": {}}
    return scores | {"recipe": run.values, "version": code_version(), "error": error}


def save_scores(run: TableRun, scores: dict[str, Any]) -> None:
    """Write a run's scores into its folder."""
    if is_first_rank():
        write_text(run.recipe.run_folder / SCORES, json.dumps(scores, indent=1))
