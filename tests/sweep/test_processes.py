"""Ends of a process: SIGTERM as Ctrl-C does, and the end of the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import HANG_S, wait_until

import qsam2
from qsam2.cli import PARENT, stopped_by_sigterm

ROOT = Path(qsam2.__file__).parents[1]

CHILD = """
import sys, time
from pathlib import Path
from qsam2.cli import stopped_by_sigterm
folder = Path(sys.argv[1])
try:
    with stopped_by_sigterm():
        (folder / "begun").touch()
        time.sleep(600)
except KeyboardInterrupt:
    (folder / "stopped").touch()
"""
PARENTS = """
import subprocess, sys
from pathlib import Path
from qsam2.cli import stopped_by_sigterm
folder = Path(sys.argv[1])
with stopped_by_sigterm():
    subprocess.Popen([sys.executable, str(folder / "child.py"), str(folder)], start_new_session=True).wait()
"""


def test_sigterm_is_an_interrupt_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, "1")  # inherited from the parent of a shell, say, which has ended
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        assert os.environ[PARENT] == str(os.getpid())
        assert threading.active_count() == threads, "nobody waits for the end of another process's parent"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(HANG_S)
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.environ[PARENT] == "1"


def test_a_thread_may_carry_out_a_command() -> None:
    def handler() -> object:
        with stopped_by_sigterm():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() == signal.getsignal(signal.SIGTERM)


def test_what_a_killed_process_started_stops(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-c", PARENTS, str(tmp_path)]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    wait_until((tmp_path / "begun").exists, parent)
    assert not (tmp_path / "stopped").exists()
    parent.kill()
    parent.wait()
    wait_until((tmp_path / "stopped").exists)
