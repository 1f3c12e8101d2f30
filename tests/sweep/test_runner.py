"""The runner of sweeps and tables: order, progress, failures, interrupts; and the command for files of both formats."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_sweep
import small_table

import qsam2
from qsam2.cli import main, stopped_by_sigterm
from qsam2.sweep import runner
from qsam2.sweep.runner import Plan, RunState, list_runs
from qsam2.sweep.scores import TablePlan
from qsam2.sweep.study import Study
from qsam2.sweep.table import float_runs

ROOT = Path(qsam2.__file__).parents[1]
WRITE = {"sweep": small_sweep.write, "table": small_table.write}


class Work:
    """A small sweep or table, whose runs a script stands for."""

    def __init__(self, kind: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.kind, self.folder = kind, folder
        if kind == "sweep":
            self.runs: Any = small_sweep.Runs(folder, patch)
            self.names = [f"00{index}" for index in range(6)]
        else:
            self.runs = small_table.Runs(folder, patch)
            self.table, own = small_table.small_table(folder)
            self.some = [*float_runs(own), *own]
            self.names = [run.name for run in self.some]
        self.tell()

    def plan(self) -> Plan:
        if self.kind == "sweep":
            return Study(small_sweep.small_sweep(self.folder), self.folder / "out", None)
        command = ["table", "small.yaml", "--output", str(self.folder / "out")]
        return TablePlan(self.table, self.some[1:], self.folder / "out", command)

    def tell(self, **how: str) -> None:
        if self.kind == "sweep":
            self.runs.tell({f"small-{name}": way for name, way in how.items()})
        else:
            self.runs.tell({run.name: small_table.scores(self.table, run, 40.0) for run in self.some}, **how)

    def begun(self) -> list[str]:
        """Runs that were begun since the last call."""
        return [name[6:] for name in self.runs.names()] if self.kind == "sweep" else self.runs.begun()

    def states(self) -> dict[str, RunState]:
        return {state.name: state for state in self.plan().states()}

    def listed(self) -> str:
        plan = self.plan()
        return list_runs(plan.states(), plan.total, 1, plan.run_seconds)


@pytest.fixture(params=WRITE)
def work(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Work:
    caplog.set_level(logging.INFO, "qsam2")
    return Work(request.param, tmp_path, monkeypatch)


def test_runs_in_order_and_progress_is_said(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    runner.carry_out(work.plan(), 1)
    assert work.begun() == work.names  # a table's float models first
    count, said = len(work.names), caplog.messages
    assert said[0] == f"{work.kind} small: {count} runs, {count} to come; about {count} min left"
    assert said[1].startswith(f"run 1 of {count}, {work.names[0]}") and said[1].endswith(" ...")
    assert said[4].startswith(f"run 2 of {count}, {work.names[1]}: ") and " left" in said[4]
    assert said[-1].startswith(f"run {count} of {count}, {work.names[-1]}: ") and "left" not in said[-1]
    assert {state.state for state in work.states().values()} == {"finished"}
    runner.carry_out(work.plan(), 1)
    assert work.begun() == []


def test_a_failed_run_is_marked_stops_no_other_and_is_tried_again(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    count, (_, bad, _, killed, *_) = len(work.names), work.names
    work.tell(**{bad: "badly", killed: "killed"})
    runner.carry_out(work.plan(), 2)
    assert len(work.begun()) == count
    errors = {name: state.error for name, state in work.states().items() if state.state == "failed"}
    assert errors == {bad: "the loss is nan at step 3; lower train.lr", killed: "killed by signal 9"}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # in either order: two runs at a time
    for name, error in errors.items():
        assert any(f"{name} failed: {error}; see " in warning for warning in warnings)
    assert f"failed    {bad}" in work.listed()
    caplog.clear()
    work.tell()
    runner.carry_out(work.plan(), 1)
    assert work.begun() == [bad, killed]
    assert caplog.messages[0].startswith(f"{work.kind} small: {count} runs, 2 to come")
    assert caplog.messages[1].startswith(f"run {count - 1} of {count}, {bad}")
    assert {state.state for state in work.states().values()} == {"finished"}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_run_once_and_stops_the_rest(work: Work, by: signal.Signals) -> None:
    work.tell(**{work.names[1]: "long"})
    work.runs.interrupt_at(work.names[1], by)
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        runner.carry_out(work.plan(), 1)
    assert work.begun() == work.names[:2]
    assert work.states()[work.names[1]].state == {"sweep": "cut off", "table": "to come"}[work.kind]


# The command


@pytest.mark.parametrize(("kind", "runs"), [("sweep", 6), ("table", 8)])
def test_both_words_list_both_formats_without_optuna_and_wandb(kind: str, runs: int, tmp_path: Path) -> None:
    file = WRITE[kind](tmp_path)
    code = "import sys; sys.modules.update(optuna=None, wandb=None); from qsam2.cli import main\n"
    code += "assert not any(main([word, *sys.argv[1:]]) for word in ('sweep', 'table'))"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(file), "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    half = len(lines) // 2
    assert lines[:half] == lines[half:] and f"{runs} runs, {runs} to come: about" in lines[-1]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("kind", "flag"),
    [("sweep", "--keep a.json"), ("sweep", "--write a.md"), ("sweep", "--render"), ("sweep", "--only a"),
     ("table", "--count 3")],
)  # fmt: skip
def test_flags_of_the_other_format_are_refused(
    kind: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(WRITE[kind](tmp_path)), *flag.split()]) == 2
    assert f"error: {flag.split()[0]}: " in capsys.readouterr().err
