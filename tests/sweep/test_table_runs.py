"""The runs of a table: the estimate of their time, what is done again and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_table import Runs, scores, small_table

from qsam2.errors import UserError
from qsam2.sweep import runner
from qsam2.sweep.runner import list_runs
from qsam2.sweep.scores import TablePlan, is_finished, save_scores
from qsam2.sweep.table import TableDefinition, TableRun, float_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def everything(table: TableDefinition, some: list[TableRun]) -> dict[str, dict[str, Any]]:
    return {run.name: scores(table, run, 40.0) for run in [*float_runs(some), *some]}


def plan(table: TableDefinition, some: list[TableRun]) -> TablePlan:
    folder = some[0].recipe.run_folder.parent
    return TablePlan(table, some, folder, ["table", "small.yaml", "--output", str(folder)])


@pytest.fixture
def finished(runs: Runs, tmp_path: Path) -> tuple[TableDefinition, list[TableRun]]:
    """The small table, carried out."""
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some))
    runner.carry_out(plan(table, some), 1)
    return table, some


def test_a_dry_run_lists_and_estimates(runs: Runs, tmp_path: Path) -> None:
    def listed(jobs: int) -> list[str]:
        return list_runs(plan(table, some).states(), len(some) + 1, jobs, table.run_seconds).splitlines()

    table, some = small_table(tmp_path)
    assert listed(1)[-1] == "8 runs, 8 to come: about 8 min with --jobs 1"
    folder = some[0].recipe.run_folder
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores(table, some[0], 1.0, seconds=7200)))
    assert listed(2)[:3] == ["to come   float_nano", f"finished  {some[0].name}", f"to come   {some[1].name}"]
    assert listed(2)[-1] == "8 runs, 7 to come: about 7.0 h with --jobs 2"


@pytest.mark.parametrize(
    ("changes", "weights", "what"),
    [
        ({"methods": {"minmax": {"calibrate.clips": 3}}}, "w", "its recipe"),
        ({"sets": {"stills": {"data": "coco:others"}}}, "w", "its data"),
        ({"sets": {"clips": {"frames": 9}}}, "w", "its recipe and data"),
        ({}, "trained anew", "its float weights"),
    ],
)
@pytest.mark.usefixtures("finished")
def test_a_run_that_the_table_no_longer_means_is_refused(
    tmp_path: Path, changes: dict[str, Any], weights: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsam2.sweep.scores.weights_digest", lambda model: weights)
    with pytest.raises(UserError, match=rf"holds a run that differs from the table's \({what}\): remove the folder"):
        runner.carry_out(plan(*small_table(tmp_path, **changes)), 1)


def test_a_run_that_was_cut_off_does_not_go_on_from_other_float_weights(tmp_path: Path) -> None:
    table, (run, *_) = small_table(tmp_path)
    save_scores(run, {**scores(table, run, 0.0), "sets": {}})
    assert not is_finished(table, run, "trained anew")
    (run.recipe.run_folder / "metrics.json").write_text("{}")
    assert not is_finished(table, run, "w")
    with pytest.raises(UserError, match="its float weights"):
        is_finished(table, run, "trained anew")


def test_what_failed_before_it_scored_may_be_put_right_in_the_table(runs: Runs, tmp_path: Path) -> None:
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some), **{some[0].name: "badly"})
    runner.carry_out(plan(table, some), 1)
    runs.begun()
    table, some = small_table(tmp_path, methods={"minmax": {"quantize.weights.percentile": 99.0}}, runs=[{}])
    some = [run for run in some if run.name == "nano_minmax_W4A4_s0"]
    runs.tell(everything(table, some))
    runner.carry_out(plan(table, some), 1)
    assert runs.begun() == ["nano_minmax_W4A4_s0"]


@pytest.mark.usefixtures("finished")
def test_a_set_that_is_added_is_all_that_is_still_to_score(tmp_path: Path) -> None:
    table, some = small_table(tmp_path, sets={"more": {"data": "davis:more"}})
    assert not any(is_finished(table, run, "w") for run in some)
