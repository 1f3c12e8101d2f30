"""A script in place of the command that carries out a run: it is told how each goes, and notes which it began."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from waiting import wait_until

GOES = """
import json, os, signal, sys, time
from pathlib import Path
told = json.loads(Path(os.environ["TOLD"]).read_text())
def goes(name, given):
    with open(os.environ["TOLD"] + ".begun", "a") as begun:
        begun.write(given + "\\n")
    how = told["how"].get(name, "well")
    if how == "badly":
        print("much\\nerror: the loss is nan at step 3; lower train.lr", file=sys.stderr)
        sys.exit(2)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "long":
        parent = os.getppid()
        while os.getppid() == parent:  # until it is stopped, or who started it has ended
            time.sleep(0.1)
        sys.exit(130)
    return how
"""
"""How a script begins: `goes` notes what a run was given, fails as it was told to, or returns how the run goes."""


class StandIn:
    """Command that `module` starts in place of `qsam2`; the script follows `GOES`."""

    def __init__(self, module: ModuleType, script: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.told = folder / "told.json"
        file = folder / "stand_in.py"
        file.write_text(GOES + script)
        patch.setattr(module, "QSAM2", (sys.executable, str(file)))
        patch.setenv("TOLD", str(self.told))

    def begun(self) -> list[str]:
        """Lines noted by the runs begun since the last call."""
        file = Path(f"{self.told}.begun")
        lines = file.read_text().splitlines() if file.is_file() else []
        file.unlink(missing_ok=True)
        return lines

    def wait_for(self, name: str) -> None:
        """Return once a run of this name has begun."""
        file = Path(f"{self.told}.begun")
        wait_until(lambda: file.is_file() and name in file.read_text())

    def interrupt_at(self, name: str, by: signal.Signals = signal.SIGINT) -> None:
        """Ctrl-C for this process as soon as a run of this name has begun; needs the fixture `interruptible`."""

        def interrupt() -> None:
            self.wait_for(name)
            os.kill(os.getpid(), by)

        threading.Thread(target=interrupt, daemon=True).start()
