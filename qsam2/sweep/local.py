"""A sweep on this machine: each run a process and a run folder, what is finished is not repeated."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from filelock import FileLock, Timeout
from optuna.trial import Trial

from qsam2.errors import UserError
from qsam2.output import aligned, read_json, write_text
from qsam2.report.curves import read_curves
from qsam2.sweep.definition import Sweep, Values, combinations
from qsam2.sweep.processes import LOG, QSAM2, Processes, duration, failure
from qsam2.sweep.study import STUDY, Study, SweepRun, count_runs, number_of, run_seconds
from qsam2.train.loggers import CURVES

RESULTS = "sweep.json"
"""In a sweep's folder: {"sweep", "metric", "goal", "runs": [a `SweepRun` each, best first], "best" (a command)}."""

POLL_S = 1.0

log = logging.getLogger("qsam2")


def run_sweep(sweep: Sweep, folder: Path, *, runs: int | None, jobs: int) -> list[SweepRun]:
    """Carry out what is left of a sweep; returns all runs, best first.

    Raises:
        UserError: see `Study`; another process is at this sweep.
    """
    study = Study(sweep, folder, runs)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _LocalSweep(sweep, folder, study, jobs).carry_out()
    except Timeout as error:
        raise UserError(f"{folder}: another qsam2 sweep is at work there; wait for it or give --output") from error
    board = ranked(sweep, study.board())
    best = board[0] if board and board[0].metric is not None else None
    metric = sweep.definition.metric
    results: dict[str, Any] = {
        "sweep": sweep.name,
        "metric": metric.name,
        "goal": metric.goal,
        "runs": [vars(run) for run in board],
    }
    results["best"] = sweep.command_of(best.values) if best else None
    write_text(folder / RESULTS, json.dumps(results, indent=1))
    return board


def own_overrides(sweep: Sweep, folder: Path, number: str) -> tuple[list[str], list[str]]:
    """What a run of a local sweep is given before the file's overrides, and after them."""
    before = ["log.wandb=offline", f"log.group={json.dumps(sweep.name)}"]
    before.append(f"evaluate.float_cache={json.dumps(str(folder / 'float'))}")
    return before, [f"name={sweep.name}-{number}", f"output={json.dumps(str(folder / number))}"]


def ranked(sweep: Sweep, board: Sequence[SweepRun]) -> list[SweepRun]:
    """Runs by their metric, the best first; then those without one."""
    sign = -1 if sweep.definition.metric.goal == "maximize" else 1
    return sorted(board, key=lambda run: math.inf if run.metric is None else sign * run.metric)


def read_metric(folder: Path, name: str) -> float | None:
    """A figure of a run's `metrics.json`, as quantized/J&F, or the last value of a curve of its training.

    Raises:
        UserError: a file is damaged.
    """
    figure: Any = read_json(folder / "metrics.json")
    for key in name.split("/"):
        figure = figure.get(key) if isinstance(figure, dict) else None
    if figure is None and (curve := read_curves(folder / CURVES).get(name)):
        figure = curve[-1][1]
    return float(figure) if isinstance(figure, (int, float)) and math.isfinite(figure) else None


class _LocalSweep:
    def __init__(self, sweep: Sweep, folder: Path, study: Study, jobs: int) -> None:
        self.sweep, self.folder, self.study = sweep, folder, study
        self.processes = Processes(jobs)
        self.left = study.begin()

    def carry_out(self) -> None:
        log.info("sweep %s: %d runs, %d to come%s", self.sweep.name, self.study.runs, self.left, self._rest())
        self.processes.each(self._work, range(self.processes.jobs))

    def _work(self, _: int) -> None:
        """Carry out runs until there are none."""
        while True:
            with self.processes.lock:
                trial = None if self.processes.stopped else self.study.ask()
                if trial is None:
                    return
                number, values = number_of(trial), self.study.values(trial)
                log.info("run %s: %s ...", number, show(values))
                try:
                    process = self._start(number, values)
                except OSError as error:
                    self.processes.stopped = True
                    raise UserError(
                        f"{self.folder / number} could not be written: {error.strerror}; make room on the disk and "
                        "give the same command again"
                    ) from error
            started = time.monotonic()
            stopped_early = self._watch(process, trial, self.folder / number)
            if self.processes.stopped:
                return
            with self.processes.lock:
                self._end(trial, process.returncode, time.monotonic() - started, stopped_early)

    def _start(self, number: str, values: Values) -> Popen[bytes]:
        arguments = self.sweep.arguments(values, *own_overrides(self.sweep, self.folder, number))
        return self.processes.start([*QSAM2, "train", str(self.sweep.recipe), *arguments], self.folder / number)

    def _watch(self, process: Popen[bytes], trial: Trial, folder: Path) -> bool:
        """Wait for a run; returns whether it was stopped because others were better at that point."""
        if self.sweep.definition.early_terminate is None:
            process.wait()
            return False
        reported, ended = 0, False
        while not ended:
            time.sleep(POLL_S)
            ended = process.poll() is not None  # what it logged last counts for those that follow
            try:
                values = read_curves(folder / CURVES).get(self.sweep.definition.metric.name, [])
            except UserError:  # it is being written
                continue
            with self.processes.lock:
                for _, value in values[reported:]:
                    reported += 1
                    trial.report(value, reported)
                    if not ended and trial.should_prune():
                        process.send_signal(signal.SIGINT)
                        process.wait()
                        return True
        return False

    def _end(self, trial: Trial, status: int, waited_s: float, stopped_early: bool) -> None:
        number = number_of(trial)
        folder, name = self.folder / number, self.sweep.definition.metric.name
        if stopped_early:
            self.study.tell(trial, seconds=waited_s)
            log.info("run %s: stopped early after %.0f s", number, waited_s)
            return
        self.left -= 1
        error, metric = failure(status, folder) if status else f"it has no {name}", None
        if status == 0:
            try:
                metric = read_metric(folder, name)
            except UserError as damage:
                error = str(damage)
        if metric is not None:
            self.study.tell(trial, metric=metric, seconds=waited_s)
            log.info("run %s: %s %.4g, %.0f s%s", number, name, metric, waited_s, self._rest())
            return
        self.study.tell(trial, error=error)
        log.warning("run %s failed: %s; see %s", number, error, folder / LOG)

    def _rest(self) -> str:
        seconds = run_seconds(self.sweep, self.study.board())
        known = self.left and seconds is not None
        return f"; about {duration(self.left * seconds / self.processes.jobs)} left" if known else ""  # type: ignore


def show(values: Values) -> str:
    """A run's values in one line."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def list_runs(sweep: Sweep, folder: Path, runs: int | None, jobs: int) -> str:
    """What a sweep will do, as text: its runs, or what is drawn; what state they are in; the time of the rest."""
    begun = Study(sweep, folder, runs).board() if (folder / STUDY).is_file() else []
    total = count_runs(sweep, runs)
    lines = [f"{run.state:8}  {run.number}  {show(run.values)}" for run in begun]
    numbers = {run.number for run in begun}
    if sweep.definition.method == "grid":
        coming = [(f"{index:03d}", values) for index, values in zip(range(total), combinations(sweep), strict=False)]
        lines += [f"to come   {number}  {show(values)}" for number, values in coming if number not in numbers]
    else:
        lines += [f"{sweep.definition.method}: {key} is {parameter}" for key, parameter in sweep.drawn.items()]
    left = sum(run.state not in ("finished", "stopped") for run in begun) + max(total - len(begun), 0)
    seconds = run_seconds(sweep, begun)
    time = f"about {duration(left * seconds / jobs)} with --jobs {jobs}" if seconds else "the first will tell the time"
    return "\n".join([*lines, f"{total} runs, {left} to come: {time}"])


def results_table(sweep: Sweep, board: Sequence[SweepRun]) -> str:
    """The runs as text, the best first, what failed last."""
    keys = list(sweep.drawn)
    rows = [["run", sweep.definition.metric.name, "seconds", *keys, ""]]
    for run in board:
        metric = run.state if run.metric is None else f"{run.metric:.4g}"
        seconds = "-" if run.seconds is None else f"{run.seconds:.0f}"
        rows.append([run.number, metric, seconds, *(_cell(run.values.get(key)) for key in keys), run.error or ""])
    return aligned(rows)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
