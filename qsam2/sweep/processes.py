"""`qsam2` in processes of its own, each with a log in its folder, which stop when the one that started them does."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import TypeVar

T = TypeVar("T")

LOG = "log.txt"
"""In a run's folder: what it said."""

QSAM2 = (sys.executable, "-m", "qsam2.cli")


class Processes:
    """Starts processes and stops them all by SIGTERM at a KeyboardInterrupt; `lock` guards what threads share."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.lock = threading.Lock()
        self.stopped = False
        self._started: list[Popen[bytes]] = []

    def each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Call `work`, which starts a process and waits for it, with each of the items, `jobs` at a time.

        Raises:
            KeyboardInterrupt: Ctrl-C, or SIGTERM within `stopped_by_sigterm`; to be called in the main thread, which
                alone hears of them.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(work, items))
            except KeyboardInterrupt:
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._started:
                    if process.poll() is None:
                        process.terminate()  # they may be deaf to SIGINT, and take it for the end of a stage
                raise

    def start(self, command: Sequence[str], folder: Path) -> Popen[bytes]:
        """Start a process whose output goes to the folder's log; call it with `lock` held and `stopped` false."""
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(max((os.cpu_count() or 1) // self.jobs, 1))
        with (folder / LOG).open("ab") as output:
            process = Popen(
                list(command),
                stdout=output,
                stderr=output,
                env={"OMP_NUM_THREADS": threads, **os.environ},
                start_new_session=True,  # Ctrl-C reaches it once, from here
            )
        self._started.append(process)
        return process


def failure(status: int, folder: Path) -> str:
    """Why a process failed: the last line of its log, or the signal that killed it."""
    if status < 0:
        return f"killed by signal {-status}"
    lines = [line for line in (folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ") if lines else "it said nothing"


def duration(seconds: float) -> str:
    """Hours or minutes as text."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
