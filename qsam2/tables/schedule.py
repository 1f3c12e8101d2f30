"""All runs of a table, each in a process of its own: what is finished is skipped, what fails is marked."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen

from qsam2.pipeline import load_float
from qsam2.tables.definition import TableDefinition, TableRun, float_runs
from qsam2.tables.scores import begin_scores, is_finished, read_scores, save_scores
from qsam2.tasks.kept import weights_digest

LOG = "log.txt"
"""In a run's folder: what it said."""

QSAM2 = (sys.executable, "-m", "qsam2.cli")

log = logging.getLogger("qsam2")


def estimate_s(table: TableDefinition, runs: Sequence[TableRun], pending: int, jobs: int) -> float:
    """Seconds that `pending` runs will take: by the median of those that are finished, or the table's own figure."""
    finished = [scores["seconds"] for run in runs if is_finished(table, run) and (scores := read_scores(run))]
    return pending * (statistics.median(finished) if finished else table.run_seconds) / jobs


def run_table(table: TableDefinition, runs: Sequence[TableRun], *, command: Sequence[str], jobs: int) -> None:
    """Carry out the runs of a table that are not finished, float models first, so many at a time.

    Args:
        command: the arguments of `qsam2` that carry out one run, but for its name.

    Raises:
        UserError: a run's folder holds another run, see `is_finished`.
    """
    floats = float_runs(runs)
    weights = {run.model: weights_digest(load_float(run.recipe)) for run in floats}
    pending = [[run for run in some if not is_finished(table, run, weights[run.model])] for some in (floats, runs)]
    total = len(floats) + len(runs)
    _Batch(table, runs, command, jobs, total, sum(map(len, pending))).carry_out(pending)


def list_runs(table: TableDefinition, runs: Sequence[TableRun], jobs: int) -> str:
    """The runs of a table as text, what state they are in, and the time that the rest will take."""
    lines, pending = [], 0
    for run in [*float_runs(runs), *runs]:
        finished = is_finished(table, run)
        pending += not finished
        scores = read_scores(run)
        failed = bool(scores and scores["error"])
        lines.append(f"{'finished' if finished else 'failed' if failed else 'to come':8}  {run.name}")
    total, seconds = len(lines), estimate_s(table, runs, pending, jobs)
    return "\n".join([*lines, f"{total} runs, {pending} to come: about {duration(seconds)} with --jobs {jobs}"])


class _Batch:
    def __init__(
        self,
        table: TableDefinition,
        runs: Sequence[TableRun],
        command: Sequence[str],
        jobs: int,
        total: int,
        pending: int,
    ) -> None:
        self.table, self.runs, self.command, self.jobs = table, runs, command, jobs
        self.total, self.pending = total, pending
        self.begun = total - pending
        self.lock = threading.Lock()
        self.processes: list[Popen[bytes]] = []
        self.stopped = False

    def carry_out(self, stages: Sequence[Sequence[TableRun]]) -> None:
        log.info("%d runs, %d of them finished%s", self.total, self.begun, self._rest())
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for stage in stages:
                    list(pool.map(self._run, stage))
            except KeyboardInterrupt:
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    if process.poll() is None:
                        process.send_signal(signal.SIGINT)
                raise

    def _run(self, run: TableRun) -> None:
        with self.lock:
            if self.stopped:
                return
            self.begun += 1
            number = f"run {self.begun} of {self.total}: {run.name}"
            log.info("%s ...", number)
            folder = run.recipe.run_folder
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("ab") as output:
                process = Popen(
                    [*QSAM2, *self.command, "--only", run.name],
                    stdout=output,
                    stderr=output,
                    env={"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // self.jobs, 1)), **os.environ},
                    start_new_session=True,  # Ctrl-C reaches it once, from here
                )
            self.processes.append(process)
        started = time.monotonic()
        status = process.wait()
        if self.stopped:
            return
        with self.lock:
            self.pending -= 1
            if status == 0:
                log.info("%s: %.0f s%s", number, time.monotonic() - started, self._rest())
                return
            error = _last_line(folder / LOG) if status > 0 else f"killed by signal {-status}"
            save_scores(run, begin_scores(run, error))
            log.warning("%s failed: %s; see %s", number, error, folder / LOG)

    def _rest(self) -> str:
        seconds = estimate_s(self.table, self.runs, self.pending, self.jobs)
        return f"; about {duration(seconds)} left" if self.pending else ""


def duration(seconds: float) -> str:
    """Hours or minutes as text."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ") if lines else "it said nothing"
