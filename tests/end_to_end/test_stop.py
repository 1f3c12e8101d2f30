"""Ctrl-C and SIGTERM stop a run at any stage, on one device and on two, and say how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import TIMEOUT_S, TRAIN_FLOAT, small, start

AGES = 10_000
"""Steps, or videos, that no run gets to the end of here."""
GRACE_S = 60


def trains(run: Path) -> bool:
    """Whether training has logged steps."""
    return any(len(file.read_text().splitlines()) > 2 for file in run.glob("curves/version_*/metrics.csv"))


def scores(log: Path) -> bool:
    """Whether videos are being scored, as the bar says."""
    return "Validation DataLoader 0:   0%" in log.read_text()


@pytest.mark.parametrize(
    ("stage", "devices", "by"),
    [
        ("train", 1, signal.SIGINT),
        ("train", 1, signal.SIGTERM),
        ("train", 2, signal.SIGTERM),
        ("score", 2, signal.SIGTERM),
    ],
)
def test_a_signal_stops_all_of_a_run(
    checkpoint: Path, tmp_path: Path, stage: str, devices: int, by: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {
        "train": TRAIN_FLOAT,
        "trainer": {"devices": devices, "max_steps": AGES if stage == "train" else 1},
        "data": {"val": f"moving_objects:{AGES}:val"},
        "evaluate": {"frames": 40},
    }
    with log.open("wb") as file:
        process = start(small(checkpoint, run, **settings), tmp_path, file)
    deadline = time.monotonic() + TIMEOUT_S
    while not (trains(run) if stage == "train" else scores(log)):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    process.send_signal(by)
    try:
        assert process.wait(GRACE_S) == 130
        deadline = time.monotonic() + GRACE_S
        while is_left(process) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_left(process)
        assert log.read_text().count("stopped; the same command goes on from the last checkpoint") == 1
    finally:
        if is_left(process):
            os.killpg(process.pid, signal.SIGKILL)


def is_left(process: subprocess.Popen[str]) -> bool:
    """Whether any process of its group, which it leads, is there."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
