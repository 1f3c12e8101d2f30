"""Ctrl-C and SIGTERM stop a run at any stage, on one device and on two, and say how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from small_runs import TRAIN_FLOAT, small, start
from waiting import HANG_S, wait_until

ENDLESS = 10_000
"""Steps, or videos, that no run here gets to the end of."""


def trains(run: Path) -> bool:
    """True once training has logged steps."""
    return any(len(file.read_text().splitlines()) > 2 for file in run.glob("curves/version_*/metrics.csv"))


def scores(log: Path) -> bool:
    """True once the progress bar shows that videos are being scored."""
    return "Validation DataLoader 0:   0%" in log.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stage", "devices", "by"),
    [
        ("train", 1, signal.SIGINT),
        ("train", 2, signal.SIGTERM),
        pytest.param("train", 1, signal.SIGTERM, marks=pytest.mark.prove),
        pytest.param("score", 2, signal.SIGTERM, marks=pytest.mark.prove),
    ],
)
def test_a_signal_stops_all_of_a_run(
    checkpoint: Path, tmp_path: Path, stage: str, devices: int, by: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {
        "train": TRAIN_FLOAT,
        "trainer": {"devices": devices, "max_steps": ENDLESS if stage == "train" else 1},
        "data": {"val": f"moving_objects:{ENDLESS}:val"},
        "evaluate": {"frames": 40},
    }
    with log.open("wb") as file:
        process = start(small(checkpoint, run, **settings), tmp_path, file)
    try:
        wait_until(lambda: trains(run) if stage == "train" else scores(log), process)
        process.send_signal(by)
        assert process.wait(HANG_S) == 130
        wait_until(lambda: not is_left(process))
        assert log.read_text().count("stopped; the same command goes on from what the run folder holds") == 1
    finally:
        if is_left(process):
            os.killpg(process.pid, signal.SIGKILL)


def is_left(process: subprocess.Popen[str]) -> bool:
    """True while any process of the group that `process` leads is running."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
