"""Which code this is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import qsam2


def code_version() -> str:
    """Version of qsam2, with its commit (and a + for changes since) where it runs from a git checkout."""
    version = qsam2.__version__
    root = Path(qsam2.__file__).parents[1]
    if not (root / ".git").exists():
        return version
    commit, changes = (
        subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "qsam2"])
    )
    return f"{version} ({commit}{'+' if changes else ''})" if commit else version
