"""All runs of a table, each in a process of its own: what is finished is skipped, what fails is marked."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence

from qsam2.evaluation.float_scores import weights_digest
from qsam2.loading import load_float
from qsam2.sweep.processes import LOG, QSAM2, Processes, duration, failure
from qsam2.sweep.table_definition import TableDefinition, TableRun, float_runs
from qsam2.sweep.table_scores import begin_scores, is_finished, read_scores, save_scores

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
        self.table, self.runs, self.command = table, runs, command
        self.total, self.pending = total, pending
        self.begun = total - pending
        self.processes = Processes(jobs)

    def carry_out(self, stages: Sequence[Sequence[TableRun]]) -> None:
        log.info("%d runs, %d of them finished%s", self.total, self.begun, self._rest())
        for stage in stages:
            self.processes.each(self._run, stage)

    def _run(self, run: TableRun) -> None:
        folder = run.recipe.run_folder
        with self.processes.lock:
            if self.processes.stopped:
                return
            self.begun += 1
            number = f"run {self.begun} of {self.total}: {run.name}"
            log.info("%s ...", number)
            process = self.processes.start([*QSAM2, *self.command, "--only", run.name], folder)
        started = time.monotonic()
        status = process.wait()
        if self.processes.stopped:
            return
        with self.processes.lock:
            self.pending -= 1
            if status == 0:
                log.info("%s: %.0f s%s", number, time.monotonic() - started, self._rest())
                return
            error = failure(status, folder)
            save_scores(run, begin_scores(run, error))
            log.warning("%s failed: %s; see %s", number, error, folder / LOG)

    def _rest(self) -> str:
        seconds = estimate_s(self.table, self.runs, self.pending, self.processes.jobs)
        return f"; about {duration(seconds)} left" if self.pending else ""
