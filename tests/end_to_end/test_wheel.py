"""The package as a wheel: what it holds, and that it works in a fresh environment, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import qsam2
from qsam2.recipe.load import FOLDERS, shipped

ROOT = Path(qsam2.__file__).parents[1]

pytestmark = pytest.mark.prove


def call(command: list[str], cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("qsam2", "recipes", "data"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    call([*pip, "--wheel-dir", str(folder), str(folder / "source")], folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path) -> str:
    """An interpreter with the wheel installed and this environment's other packages on its path."""
    venv = wheel.parent / "venv"
    call([sys.executable, "-m", "venv", "--without-pip", str(venv)], wheel.parent)
    interpreter = str(venv / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index"]
    call([*pip, str(wheel)], wheel.parent)
    site = next((venv / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return interpreter


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"qsam2"}
    files = [file for kind in FOLDERS for file in shipped(kind).values()]
    files += (ROOT / "qsam2/report/templates").iterdir()
    assert names >= {f"qsam2/{file.relative_to(ROOT / 'qsam2')}" for file in files}
    assert names >= {
        f"qsam2/{file.relative_to(ROOT / 'qsam2')}" for file in (ROOT / "qsam2/report/templates").iterdir()
    }
    assert names >= {f"qsam2/models/nano/{name}.safetensors" for name in ("nano", "nano_heavy")}
    assert "qsam2/quantizers/native.cpp" in names
    assert names >= {f"qsam2/models/nano/{name}.md" for name in ("nano", "data")}  # the weights' card and data terms
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0 AND LicenseRef-nano-weights" in text
    assert "License-File: qsam2/models/nano/nano.md" in text and "License-File: data/nano.md" in text
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "qsam2").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_it_works_from_an_empty_folder(python: str, tmp_path: Path) -> None:
    place = call([python, "-c", "import qsam2; print(qsam2.__file__)"], tmp_path).strip()
    assert Path(place).is_relative_to(Path(python).parents[1])
    assert "qat_w4a4" in call([python, "-m", "qsam2", "recipes"], tmp_path)
    small = ["debug=fast", "model.image_size=64", "model.checkpoint=null"]
    assert "lsc" in call([python, "-m", "qsam2", "train", "qat_w4a4", *small, "--dry-run"], tmp_path)
    code = "import PIL.Image as I; I.new('RGB', (96, 64), 'red').save('picture.png')"
    call([python, "-c", code], tmp_path)
    call([python, "-m", "qsam2", "predict", "nano", "picture.png", "--point", "40,30", "--out", "out"], tmp_path)
    assert (tmp_path / "out" / "mask.png").is_file()
