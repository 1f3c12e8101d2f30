"""The runs of a local sweep: what is drawn, what is repeated and what is not, how they fail and stop."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_sweep import ACTIVATIONS, COMMAND, RANGES, WEIGHTS, Runs, small_sweep, write
from sqlalchemy import Engine, event

from qsam2.cli import main
from qsam2.commands.sweep import _list_sweep as list_sweep
from qsam2.errors import UserError
from qsam2.sweep import runner
from qsam2.sweep.definition import STUDY, Sweep
from qsam2.sweep.runner import RunState
from qsam2.sweep.study import Study, ranked, sweep_text, write_sweep

QAT = [COMMAND[3].replace("ptq_", "qat_"), COMMAND[-1]]
KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from qsam2.sweep import runner
from qsam2.sweep.definition import load_sweep
from qsam2.sweep.study import Study
runner.QSAM2 = (sys.executable, sys.argv[2])
runner.carry_out(Study(load_sweep(sys.argv[3]), Path(sys.argv[4]), None), 1)
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def carry_out(sweep: Sweep, tmp_path: Path, count: int | None = None, jobs: int = 1) -> list[RunState]:
    study = Study(sweep, tmp_path / "out", count)
    runner.carry_out(study, jobs)
    board = ranked(sweep, study.states())
    write_sweep(sweep, board, tmp_path / "out")
    return board


def test_a_grid_from_its_first_run_to_the_table(runs: Runs, tmp_path: Path) -> None:
    sweep = small_sweep(tmp_path)
    pairs = [(weights, activations) for weights in (2, 4) for activations in (4, 6, 8)]
    assert list_sweep(sweep, tmp_path / "out", None, 2).splitlines() == [
        *(f"to come   00{n}  {WEIGHTS}={w}, {ACTIVATIONS}={a}" for n, (w, a) in enumerate(pairs)),
        "6 runs, 6 to come: about 3 min with --jobs 2",
    ]
    board = carry_out(sweep, tmp_path)
    given = runs.given()
    assert [each["name"] for each in given] == [f"small-00{n}" for n in range(6)]
    assert [(int(each[WEIGHTS]), int(each[ACTIVATIONS])) for each in given] == pairs
    assert {(each["log.wandb"], each["log.group"], each["seed"]) for each in given} == {("offline", '"small"', "1")}
    assert json.loads(given[0]["output"]) == str(tmp_path / "out" / "000")
    assert [run.name for run in board] == ["005", "004", "003", "002", "001", "000"]
    assert dict(board[0].values) == {WEIGHTS: 4, ACTIVATIONS: 8} and board[0].metric == pytest.approx(4.8)
    table = sweep_text(sweep, board).splitlines()
    assert table[0].split() == ["run", "quantized/J&F", "seconds", WEIGHTS, ACTIVATIONS]
    assert table[1].split()[:2] == ["005", "4.8"] and table[1].split()[3:] == ["4", "8"]
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["number"] for run in kept["runs"]] == [run.name for run in board]
    assert kept["best"] == sweep.command_of(board[0].values)


def test_a_run_without_the_metric_has_failed(runs: Runs, tmp_path: Path) -> None:
    sweep = small_sweep(tmp_path)
    runs.tell({"small-002": "damaged", "small-004": "without"})
    board = carry_out(sweep, tmp_path)
    errors = {run.name: run.error for run in board if run.state == "failed"}
    assert "002/metrics.json is damaged (" in errors.pop("002") and errors == {"004": "it has no quantized/J&F"}
    assert [run.state for run in board] == ["finished"] * 4 + ["failed"] * 2
    assert "it has no quantized/J&F" in sweep_text(sweep, board)


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_draws_within_their_ranges_and_goes_on_where_it_stopped(runs: Runs, tmp_path: Path, method: str) -> None:
    parameters = {**RANGES, "calibrate.rounding": {"values": [None, {"method": "gptq", "damping": 0.1}]}}
    sweep = small_sweep(tmp_path, method=method, parameters=parameters, run_cap=5)
    with pytest.raises(UserError, match=f"method {method} has no end: give --count N or run_cap"):
        carry_out(small_sweep(tmp_path, method=method, parameters=parameters), tmp_path)
    assert f"{method}: {WEIGHTS} is int_uniform from 2 to 8" in list_sweep(sweep, tmp_path / "out", None, 1)
    runs.tell({"small-001": "badly"})
    carry_out(sweep, tmp_path, count=3)
    assert runs.names() == ["small-000", "small-001", "small-002"]
    board = {run.name: run for run in carry_out(sweep, tmp_path)}
    given = runs.given()
    assert given[0]["name"] == "small-001" and len(given) == 3 and len(board) == 5
    assert int(given[0][WEIGHTS]) == board["001"].values[WEIGHTS]  # tried again with what it was given
    for run in board.values():
        assert 2 <= run.values[WEIGHTS] <= 8 and 0 <= run.values["calibrate.smooth"] <= 1
        assert run.values["calibrate.rounding"] in parameters["calibrate.rounding"]["values"]
    assert len({json.dumps(run.values) for run in board.values()}) == 5


def test_a_sweep_ends_at_its_target(runs: Runs, tmp_path: Path) -> None:
    board = carry_out(small_sweep(tmp_path, metric={"target": 2.6}), tmp_path)
    assert len(runs.begun()) == 2
    assert [run.state for run in board] == ["finished"] * 2 + ["to come"] * 4


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def _started_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes that a shell starts in the background ignore SIGINT, and so do theirs."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_started_in")
def test_hyperband_stops_what_is_worse_at_a_rung(runs: Runs, tmp_path: Path) -> None:
    good, bad = [9 - n for n in range(8)], [20.0] * 2000
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    metric = {"name": "loss", "goal": "minimize"}
    values = {"values": [2, 3, 4]}
    sweep = small_sweep(tmp_path, command=QAT, metric=metric, early_terminate=rule, parameters={WEIGHTS: values})
    runs.tell({"small-000": good, "small-001": bad, "small-002": [1.0] * 8})
    board = {run.name: run for run in carry_out(sweep, tmp_path)}
    assert [board[number].state for number in ("000", "001", "002")] == ["finished", "stopped", "finished"]
    assert (board["000"].metric, board["002"].metric) == (2.0, 1.0)
    assert not (tmp_path / "out" / "001" / "metrics.json").exists()  # it did not come to its end
    carry_out(sweep, tmp_path)
    assert len(runs.begun()) == 3  # what was stopped early is not begun again


ROOT = os.pathsep.join([str(Path(COMMAND[3]).parents[1]), os.environ.get("PYTHONPATH", "")])


def test_kill_9_in_the_middle(runs: Runs, tmp_path: Path) -> None:
    """What is finished is not repeated; what was cut off goes on first, in its own folder."""
    runs.tell({"small-002": "long"})
    (tmp_path / "killed.py").write_text(KILLED)
    here, out = str(Path(__file__).parent), tmp_path / "out"
    command = [sys.executable, "killed.py", here, "stand_in.py", str(write(tmp_path)), str(out)]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, env={**os.environ, "PYTHONPATH": ROOT})
    runs.wait_for("small-002")
    process.kill()
    process.wait()
    assert runs.names() == ["small-000", "small-001", "small-002"]
    sweep = small_sweep(tmp_path)
    assert "cut off   002" in list_sweep(sweep, out, None, 1)
    runs.tell({})
    board = carry_out(sweep, tmp_path)
    assert runs.names() == ["small-002", "small-003", "small-004", "small-005"]
    assert [run.state for run in board] == ["finished"] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {WEIGHTS: {"values": [2, 3]}}}, "out holds another sweep .it differs in parameters.; give"),
        ({"metric": {"goal": "minimize"}}, "out holds another sweep .it differs in metric.; give another folder"),
        ({"command": [COMMAND[3], COMMAND[-1]]}, "out holds another sweep .it differs in overrides.; give another"),
        ({"parameters": {"calibrate.smooth": {"distribution": "normal"}}, "method": "random", "run_cap": 2},
         "calibrate.smooth: distribution=normal is drawn by W&B only: wandb login, or"),
    ],
)  # fmt: skip
def test_what_is_refused(runs: Runs, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    carry_out(small_sweep(tmp_path), tmp_path, count=1)
    with pytest.raises(UserError, match=message):
        carry_out(small_sweep(tmp_path, **changes), tmp_path)


@pytest.mark.parametrize("what", ["database", "log"])
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    file, out = str(write(tmp_path)), tmp_path / "out"
    monkeypatch.setattr("qsam2.train.loggers.has_wandb_key", lambda: False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if what == "log":
            patch.setattr(runner, "Popen", full)
        else:
            patch.setattr("qsam2.sweep.study.optuna.create_study", full)
        assert main(["sweep", file, "--output", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {out}/") and "could not be written: No space left on device; make room" in said
    assert runs.begun() == [] and not list(out.rglob("*.tmp"))
    assert main(["sweep", file, "--output", str(out)]) == 0
    assert len(runs.begun()) == 6
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].startswith("best: qsam2 train ") and shown[-1].startswith("to upload: wandb sync ")


def test_a_database_that_may_not_grow(runs: Runs, tmp_path: Path) -> None:
    """SQLite's own words for a full disk."""
    sweep = small_sweep(tmp_path, method="random", run_cap=200)
    carry_out(sweep, tmp_path, count=1)

    def limit(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count=1")  # no more than there are

    event.listen(Engine, "connect", limit)
    try:
        with pytest.raises(UserError, match=f"{STUDY} could not be written: database or disk is full; make room on"):
            carry_out(sweep, tmp_path)
    finally:
        event.remove(Engine, "connect", limit)
    assert len(carry_out(sweep, tmp_path, count=len(runs.names()) + 1)) > 1
