"""The README's lines of Python and its `qsam2 predict` run as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsam2.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FRAMES = 16


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the clip where the README has it; what is written does not land in the repository."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "clip.mp4", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)


def test_ten_lines_of_python_track_and_save(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == [f"mask-{i:05d}.png" for i in range(FRAMES)]
    masks = [np.array(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]
    assert all(mask.shape == (256, 256) and mask.dtype == bool for mask in masks) and any(mask.any() for mask in masks)


def test_the_command_line_does_the_same(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    qsam2 (predict .*)$", README, flags=re.MULTILINE)
    assert main(shlex.split(line)) == 0
    assert len(list((tmp_path / "out/clip/masks").iterdir())) == FRAMES
    assert (tmp_path / "out/clip/overlay.mp4").stat().st_size > 1000
