"""`qsam2 sweep` and `qsam2 table`: one command for files of both formats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_sweep
import small_table

import qsam2
from qsam2.cli import main

ROOT = Path(qsam2.__file__).parents[1]


@pytest.mark.parametrize(("write", "runs"), [(small_sweep.write, 6), (small_table.write, 8)])
def test_both_words_take_both_formats(
    write: object, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)  # type: ignore[operator]
    shown = []
    for word in ("sweep", "table"):
        assert main([word, str(file), "--dry-run"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and f"\n{runs} runs, {runs} to come: about" in shown[0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("flag", [["--keep", "a.json"], ["--write", "a.md"], ["--render"], ["--only", "a"]])
def test_a_sweep_refuses_flags_of_tables(flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(small_sweep.write(tmp_path)), *flag]) == 2
    assert f"error: {flag[0]}: " in capsys.readouterr().err


def test_a_table_refuses_flags_of_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(small_table.write(tmp_path)), "--count", "3"]) == 2
    assert "error: --count: " in capsys.readouterr().err


@pytest.mark.parametrize("write", [small_sweep.write, small_table.write])
def test_a_list_of_runs_needs_neither_optuna_nor_wandb(write: object, tmp_path: Path) -> None:
    file = write(tmp_path)  # type: ignore[operator]
    code = "import sys; sys.modules.update(optuna=None, wandb=None); from qsam2.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code, "sweep", str(file), "--dry-run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert " to come: about" in ran.stdout, ran.stderr
