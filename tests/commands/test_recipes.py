"""`qsam2 recipes`, and `python -m qsam2`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from qsam2.recipe.shipped import PATTERNS, shipped

from qsam2.cli import main


def test_all_shipped_files_are_listed_with_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    rows = {
        words[0]: words[1] for line in capsys.readouterr().out.splitlines() if len(words := line.split(maxsplit=1)) > 1
    }
    assert rows.keys() == {name for kind in PATTERNS for name in shipped(kind)}
    assert all(title.endswith(".") for title in rows.values())


def test_one_is_printed_from_any_folder(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "qsam2", "recipes", "bits"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, shipped("sweep")["bits"].read_text(), "")


@pytest.mark.parametrize("arguments", [["nothing"], ["bits", "seed=1"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {arguments[-1]} does n")
