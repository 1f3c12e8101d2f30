"""The benchmark of tracking on a small model: what it measures, that its command writes it, what it cannot run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from qsam2.benchmark import engines as tracking_engines
from qsam2.benchmark import tracked_frame as tracking
from qsam2.benchmark.engines import ENGINES, PARTS, Engine, Setting, Tracking
from qsam2.benchmark.tracked_frame import COLUMNS, benchmark_tracking, markdown_table
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.fast.model import FastSAM2
from qsam2.models import SAM2
from qsam2.models.sam2 import model_config

SIZE_PX = 64
SMALL = ["--size", "nano", "--image-size", str(SIZE_PX), "--repeats", "1"]


def few_blocks(size: str, *, image_size: int) -> SAM2:
    """nano with one block a stage and one layer of memory attention."""
    config = model_config(size, image_size=image_size)
    config.image_encoder.trunk.stages, config.memory_attention.num_layers = [1, 1, 1, 1], 1
    return instantiate(config).eval()


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "tracking.json"
    engines = ["sam2", "sam2 bf16", "qsam2", "qsam2 exact"]
    assert main(["benchmark", "tracking", *SMALL, "--engines", *engines, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result) == engines
    for row in result.values():
        assert tuple(row) == COLUMNS == ("seconds_per_frame", "encoder_seconds", "memory_seconds", "decoder_seconds")
        parts = [row[f"{part}_seconds"] for part in PARTS]
        assert all(part > 0 for part in parts) and sum(parts) < row["seconds_per_frame"]
    table = capsys.readouterr().out
    assert "| sam2 | " in table and "| 1.00 |" in table


def test_other_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported, quantized by ONNX Runtime, tracked; OpenVINO where it is installed."""
    monkeypatch.setattr(tracking, "build_sam2", few_blocks)  # the exporter takes half a minute for all of nano
    there = [name for name in ENGINES if "runtime" in name or "openvino" in name]
    chosen = [name for name in there if ENGINES[name].missing() is None]
    assert "onnxruntime int8" in chosen
    result = benchmark_tracking(size="nano", image_size=SIZE_PX, repeats=1, engines=chosen)
    assert list(result) == chosen and all(value > 0 for row in result.values() for value in row.values())
    assert "| - |" in markdown_table(result)  # nothing to be faster than


def test_our_engines_are_fast_models_behind_a_full_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    names = ["sam2", "qsam2", "qsam2 exact"]
    for name in names:

        def start(
            setting: Setting, name: str = name, start: Callable[[Setting], Tracking] = ENGINES[name].start
        ) -> Any:
            runs[name] = start(setting)
            return runs[name]

        monkeypatch.setitem(ENGINES, name, Engine(start))
    benchmark_tracking(size="nano", image_size=SIZE_PX, repeats=1, engines=names)
    tokens = (SIZE_PX // 16) ** 2
    exact = runs["qsam2 exact"].model
    assert isinstance(exact, FastSAM2) and not isinstance(runs["sam2"].model, FastSAM2)
    pointers = 2 * 7
    assert exact.memory_reader.keys == 7 * tokens + pointers
    shared = runs["qsam2"].model
    assert isinstance(shared, FastSAM2)
    assert shared.memory_reader.keys == 3 * tokens + pointers


def test_left_out_engines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    row = dict.fromkeys(COLUMNS, 1.0)
    line = markdown_table({"sam2": row}).splitlines()[-1]
    assert line.startswith("openvino int8 is left out, it needs ")
    assert "nncf" in line and line.endswith(": pip install openvino nncf 'qsam2[onnx]'")
    with pytest.raises(UserError, match=r"^--engines 'openvino int8' needs .*nncf: pip install openvino nncf"):
        benchmark_tracking(size="nano", image_size=SIZE_PX, repeats=1, engines=["openvino int8"])


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_engines.shutil, "which", lambda name: None)
    assert ENGINES["sam2 compile"].missing() == "a C++ compiler"
    assert ENGINES["sam2"].missing() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "--repeats 0: give a whole number from 1 up"),
        ({"engines": ["qsam"]}, "--engines 'qsam' is unknown: choose from sam2, .*; did you mean 'qsam2'"),
        ({"size": "huge"}, "model.size='huge' is unknown"),
        ({"image_size": 65}, "model.image_size=65 is impossible"),
    ],
)
def test_impossible_wishes(change: dict[str, object], message: str) -> None:
    given = {"size": "nano", "image_size": SIZE_PX, "repeats": 1, "engines": ["sam2"]}
    with pytest.raises(UserError, match=f"^{message}"):
        benchmark_tracking(**{**given, **change})  # type: ignore[arg-type]


def test_no_recipe_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "tracking", "model.size=nano"]) == 2
    assert "this benchmark reads none" in capsys.readouterr().err
