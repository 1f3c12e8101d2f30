"""The runner of sweeps and tables: each run is a process with a folder and a log; finished runs are not repeated."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

from filelock import FileLock, Timeout

from qsam2.errors import UserError

LOG = "log.txt"
"""Output of a run, in its folder."""
QSAM2 = (sys.executable, "-m", "qsam2")
POLL_S = 1.0
"""Time between two looks at the curves of a run that may be stopped early."""

log = logging.getLogger("qsam2")


@dataclass(frozen=True)
class RunState:
    """State of one run: "finished", "failed", "stopped" (early), "cut off" or "to come"."""

    name: str
    """Name of its folder."""
    state: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Recipe keys that differ between runs."""
    metric: float | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """One run to start."""

    name: str
    folder: Path
    arguments: Sequence[str]
    """Arguments of `qsam2`."""
    item: Any
    """Handle by which the plan knows the run."""
    values: Mapping[str, Any] = field(default_factory=dict)


class Plan(ABC):
    """The runs of a sweep or table: their number, their states, and which is next. Not thread-safe."""

    name: str
    folder: Path
    total: int
    run_seconds: float | None
    """Estimate for one run, used until runs have finished."""
    stops_early = False

    @abstractmethod
    def states(self) -> list[RunState]:
        """All runs that are known so far, in order."""

    @abstractmethod
    def stages(self) -> Iterable[Iterator[Job]]:
        """Runs to start; a stage begins once all runs of the one before it have ended."""

    @abstractmethod
    def end(self, job: Job, seconds: float, error: str | None, stopped: bool) -> str:
        """Record how a run ended, stopped early or not; returns its result for the log, or raises RunFailed."""

    def is_behind(self, job: Job) -> bool:
        """Read what a run has logged since the last call; whether it is to be stopped early."""
        return False


class RunFailed(Exception):
    """A run without a result; its text is the reason."""


def disk_is_full(path: Path, cause: str | None) -> UserError:
    """The error to raise for a file or folder that could not be written."""
    return UserError(f"{path} could not be written: {cause}; make room on the disk and give the same command again")


def carry_out(plan: Plan, jobs: int) -> None:
    """Carry out the runs of a plan that are not finished, `jobs` at a time. Call it in the main thread.

    Raises UserError if another process is at work in the folder, or it cannot be written, and what the plan raises;
    on Ctrl-C, or SIGTERM within `stopped_by_sigterm`, the processes are stopped.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.folder / ".lock", timeout=0):
            _Runner(plan, jobs).carry_out()
    except Timeout as error:
        raise UserError(f"{plan.folder}: another qsam2 is at work there; wait for it or give --output") from error


def list_runs(states: Sequence[RunState], total: int, jobs: int, run_seconds: float | None) -> str:
    """The runs with their states, and an estimate of the time that the rest takes, as text."""
    lines = [f"{run.state:8}  {run.name}  {_show(run.values)}".rstrip() for run in states]
    left = count_left(states, total)
    time = _estimate(states, left, jobs, run_seconds)
    said = f"about {time} with --jobs {jobs}" if time else "no estimate before the first"
    return "\n".join([*lines, f"{total} runs, {left} to come: {said}"])


def count_left(states: Iterable[RunState], total: int) -> int:
    """The number of runs that are neither finished nor stopped early."""
    return max(total - sum(run.state in ("finished", "stopped") for run in states), 0)


def _estimate(states: Iterable[RunState], left: int, jobs: int, run_seconds: float | None) -> str | None:
    """Time for the runs that are left, by the median of those so far or, before the first has ended, `run_seconds`."""
    durations = [run.seconds for run in states if run.seconds]
    one = statistics.median(durations) if durations else run_seconds
    if one is None:
        return None
    seconds = left * one / jobs
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _show(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


class _Runner:
    def __init__(self, plan: Plan, jobs: int) -> None:
        self.plan, self.jobs = plan, jobs
        self.left = count_left(plan.states(), plan.total)
        self.begun = plan.total - self.left
        self.lock = threading.Lock()  # guards the plan and what stands here
        self.stopped = False  # by Ctrl-C or a full disk
        self.processes: list[Popen[bytes]] = []

    def carry_out(self) -> None:
        log.info("%s: %d runs, %d to come%s", self.plan.name, self.plan.total, self.left, self._time_left())
        for stage in self.plan.stages():
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(self._work, [stage] * self.jobs))
                except KeyboardInterrupt:
                    self.stopped = True
                    for process in self.processes:
                        process.terminate()  # SIGINT is ignored by runs of a sweep in the background of a script
                    raise

    def _work(self, queue: Iterator[Job]) -> None:
        """Carry out runs of a queue until it is empty."""
        while True:
            with self.lock:
                job = None if self.stopped else next(queue, None)
                if job is None:
                    return
                self.begun += 1
                title = f"run {self.begun} of {self.plan.total}, {job.name}"
                log.info("%s%s ...", title, f": {_show(job.values)}" if job.values else "")
                process = self._start(job)
            started = time.monotonic()
            stopped_early = self._wait(process, job)
            if self.stopped:
                return
            with self.lock:
                self._end(job, title, process.returncode, time.monotonic() - started, stopped_early)

    def _start(self, job: Job) -> Popen[bytes]:
        threads = str(max((os.cpu_count() or 1) // self.jobs, 1))
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with (job.folder / LOG).open("ab") as output:
                process = Popen(
                    [*QSAM2, *job.arguments],
                    stdout=output,
                    stderr=output,
                    env={"OMP_NUM_THREADS": threads, **os.environ},
                    start_new_session=True,  # Ctrl-C in the terminal reaches a run once, from here
                )
        except OSError as error:
            self.stopped = True
            raise disk_is_full(job.folder, error.strerror) from error
        self.processes.append(process)
        return process

    def _wait(self, process: Popen[bytes], job: Job) -> bool:
        """Wait for a run; returns whether it was stopped because others were better at the same point."""
        if not self.plan.stops_early:
            process.wait()
            return False
        ended = False
        while not ended:
            time.sleep(POLL_S)
            ended = process.poll() is not None  # its last values count for the runs that follow
            with self.lock:
                behind = self.plan.is_behind(job)
            if behind and not ended:
                process.terminate()
                process.wait()
                return True
        return False

    def _end(self, job: Job, title: str, status: int, seconds: float, stopped: bool) -> None:
        self.left -= 1
        error = _failure(status, job.folder) if status and not stopped else None
        try:
            result = self.plan.end(job, seconds, error, stopped)
            log.info("%s: %s, %.0f s%s", title, result, seconds, self._time_left())
        except RunFailed as failed:
            log.warning("%s failed: %s; see %s", title, failed, job.folder / LOG)

    def _time_left(self) -> str:
        time = _estimate(self.plan.states(), self.left, self.jobs, self.plan.run_seconds)
        return f"; about {time} left" if self.left and time else ""


def _failure(status: int, folder: Path) -> str:
    """The last line of a failed run's log, or the signal that killed it."""
    if status < 0:
        return f"killed by signal {-status}"
    lines = [line for line in (folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ") if lines else "it has no output"
