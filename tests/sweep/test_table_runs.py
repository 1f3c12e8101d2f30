"""The order of a table's runs, what is repeated and what is not, what is said, and how it stops."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
from small_table import Runs, scores, small_table

from qsam2.cli import stopped_by_sigterm
from qsam2.errors import UserError
from qsam2.sweep import runner
from qsam2.sweep.runner import list_runs
from qsam2.sweep.scores import TablePlan, is_finished, read_scores, save_scores
from qsam2.sweep.table import TableDefinition, TableRun, float_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qsam2")


def everything(table: TableDefinition, some: list[TableRun]) -> dict[str, dict[str, Any]]:
    return {run.name: scores(table, run, 40.0) for run in [*float_runs(some), *some]}


def carry_out(table: TableDefinition, some: list[TableRun], tmp_path: Path, jobs: int = 1) -> None:
    runner.carry_out(plan(table, some), jobs)


def plan(table: TableDefinition, some: list[TableRun]) -> TablePlan:
    folder = some[0].recipe.run_folder.parent
    return TablePlan(table, some, folder, ["table", "small.yaml", "--output", str(folder)])


def listed(table: TableDefinition, some: list[TableRun], jobs: int) -> str:
    return list_runs(plan(table, some).states(), len(some) + 1, jobs, table.run_seconds)


def test_float_models_first_then_the_table_in_order_and_progress_is_said(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some))
    carry_out(table, some, tmp_path)
    assert runs.begun() == ["float_nano", *(run.name for run in some)]
    said = caplog.messages
    assert said[0] == "table small: 8 runs, 8 to come; about 8 min left"
    assert said[1] == "run 1 of 8, float_nano ..."
    assert said[4].startswith("run 2 of 8, nano_minmax_W4A4_s0: scored, ")  # 10 s each, measured
    assert said[-1].startswith("run 8 of 8, ") and "left" not in said[-1]
    assert all(is_finished(table, run) for run in some)


def test_finished_runs_are_not_repeated_and_failed_ones_are_tried_again(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, some = small_table(tmp_path)
    bad, killed = some[1].name, some[3].name
    runs.tell(everything(table, some), **{bad: "badly", killed: "killed"})
    carry_out(table, some, tmp_path, jobs=2)
    assert len(runs.begun()) == 8
    assert [read_scores(run)["error"] for run in (some[1], some[3])] == [
        "the loss is nan at step 3; lower train.lr",
        "killed by signal 9",
    ]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # in either order: two runs at a time
    assert any(f"{bad} failed: the loss is nan at step 3; lower train.lr; see " in warning for warning in warnings)
    assert any(f"{killed} failed: killed by signal 9; see " in warning for warning in warnings)
    assert "failed    " + bad in listed(table, some, 1)
    caplog.clear()
    runs.tell(everything(table, some))
    carry_out(table, some, tmp_path)
    assert runs.begun() == [bad, killed]
    assert caplog.messages[0].startswith("table small: 8 runs, 2 to come")
    assert caplog.messages[1] == f"run 7 of 8, {bad} ..."
    carry_out(table, some, tmp_path)
    assert runs.begun() == []


def test_a_dry_run_lists_and_estimates(runs: Runs, tmp_path: Path) -> None:
    table, some = small_table(tmp_path)
    assert listed(table, some, 1).splitlines()[-1] == "8 runs, 8 to come: about 8 min with --jobs 1"
    folder = some[0].recipe.run_folder
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores(table, some[0], 1.0, seconds=7200)))
    lines = listed(table, some, 2).splitlines()
    assert lines[:3] == ["to come   float_nano", f"finished  {some[0].name}", f"to come   {some[1].name}"]
    assert lines[-1] == "8 runs, 7 to come: about 7.0 h with --jobs 2"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"methods": {"minmax": {"calibrate.clips": 3}}}, "its recipe"),
        ({"sets": {"stills": {"data": "coco:others"}}}, "its data"),
        ({"sets": {"clips": {"frames": 9}}}, "its recipe and data"),
    ],
)
def test_a_run_that_the_table_no_longer_means_is_refused(
    runs: Runs, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some))
    carry_out(table, some, tmp_path)
    with pytest.raises(UserError, match=rf"holds a run that differs from the table's \({what}\): remove the folder"):
        carry_out(*small_table(tmp_path, **changes), tmp_path)


def test_other_float_weights_are_refused(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some))
    carry_out(table, some, tmp_path)
    monkeypatch.setattr("qsam2.sweep.scores.weights_digest", lambda model: "trained anew")
    with pytest.raises(UserError, match="float_nano holds a run that differs from the table's .its float weights"):
        carry_out(table, some, tmp_path)


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
    carry_out(table, some, tmp_path)
    runs.begun()
    table, some = small_table(tmp_path, methods={"minmax": {"quantize.weights.percentile": 99.0}}, runs=[{}])
    some = [run for run in some if run.name == "nano_minmax_W4A4_s0"]
    runs.tell(everything(table, some))
    carry_out(table, some, tmp_path)
    assert runs.begun() == ["nano_minmax_W4A4_s0"]


def test_a_set_that_is_added_is_all_that_is_still_to_score(runs: Runs, tmp_path: Path) -> None:
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some))
    carry_out(table, some, tmp_path)
    table, some = small_table(tmp_path, sets={"more": {"data": "davis:more"}})
    assert not any(is_finished(table, run, "w") for run in some)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_run_once_and_stops_the_table(runs: Runs, tmp_path: Path, by: signal.Signals) -> None:
    table, some = small_table(tmp_path)
    runs.tell(everything(table, some), **{some[0].name: "long"})
    runs.interrupt_at(some[0].name, by)
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        carry_out(table, some, tmp_path)
    assert runs.begun() == ["float_nano", some[0].name]
    assert read_scores(some[0]) is None  # neither finished nor failed
