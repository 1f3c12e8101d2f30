"""Waiting for other processes: on conditions, with one limit that only ends a hang."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

HANG_S = 600
"""Longer than anything takes that is waited for, on a busy machine as well."""


def wait_until(condition: Callable[[], object], process: subprocess.Popen[Any] | None = None) -> None:
    """Return once `condition()` is true; fail after `HANG_S`, or if `process` ends before."""
    end = time.monotonic() + HANG_S
    while not condition():
        assert process is None or process.poll() is None, "the process ended before its time"
        assert time.monotonic() < end, f"nothing came of it in {HANG_S} s"
        time.sleep(0.02)
