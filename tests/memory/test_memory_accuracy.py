"""The benchmark of what fewer keys cost: which clips it takes, images encoded once, where it goes on, its table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.models import SAM2

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_accuracy.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_returning_objects(script: ModuleType) -> None:
    assert script.returns([100, 90, 0, 2, 0, 50])
    assert not script.returns([100, 90, 0, 2, 50])  # for too short a while
    assert not script.returns([100, 90, 0, 0, 0])  # never seen again
    assert not script.returns([100, 10, 10, 10, 50])  # seen all the time


def test_speed_is_relative_to_size(script: ModuleType) -> None:
    masks = np.zeros((3, 32, 32), dtype=bool)
    for index in range(3):
        masks[index, 4:8, 4 + 2 * index : 8 + 2 * index] = True
    assert script.speed(masks) == pytest.approx(2 / 4)
    assert script.speed(np.repeat(masks, 2, axis=1).repeat(2, axis=2)) == pytest.approx(2 / 4)
    assert script.speed(masks[:1]) == 0


def test_images_are_encoded_once(script: ModuleType, model: SAM2) -> None:
    images = torch.randn(2, 1, 3, model.image_size, model.image_size)
    calls: list[object] = []
    model.image_encoder.register_forward_hook(lambda *_: calls.append(None))
    with torch.inference_mode():
        expected = [model.forward_image(image) for image in images]
        cached = script.cached_images(model)
        calls.clear()
        for _ in range(2):
            for image, plain in zip(images, expected, strict=True):
                encoded = cached.forward_image(image)
                for key in ("backbone_fpn", "vision_pos_enc"):
                    assert all(map(torch.equal, encoded[key], plain[key]))
                encoded["backbone_fpn"].clear()  # as sam2 may, with its own list
    assert len(calls) == 2


def test_it_goes_on_where_it_was(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = moving_objects("test", 2, num_frames=6, size=(64, 64))
    monkeypatch.setattr(script, "open_videos", lambda _: list(clips))
    monkeypatch.setattr(script, "clips", lambda _: [])
    settings = {name: script.SETTINGS[name] for name in ("whole", "cache", "adaptive 2", "oldest 2")}
    monkeypatch.setattr(script, "SETTINGS", settings)
    monkeypatch.setattr(script, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(sys, "argv", ["memory_accuracy.py", "--out", str(tmp_path / "out"), "--clips", "0"])
    script.main()
    files = sorted((tmp_path / "out" / "float").iterdir())
    assert [file.name for file in files] == ["adaptive-2.json", "cache.json", "oldest-2.json", "whole.json"]
    scored = {file.stem: json.loads(file.read_text()) for file in files}
    for items in scored["cache"]["per_object"].values():
        assert all(item["fidelity"] == pytest.approx(100) for item in items.values())
    assert scored["adaptive-2"]["keys"] < scored["cache"]["keys"] and scored["cache"]["sums_memory"]

    files[0].unlink()
    before = {file: file.stat().st_mtime_ns for file in files[1:]}
    script.main()
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == before
    assert json.loads(files[0].read_text())["per_object"] == scored["adaptive-2"]["per_object"]

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["memory_accuracy.py", "--out", str(tmp_path / "out"), "--render"])
    script.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row[0] for row in rows]
    assert names == ["| setting", "| cache", "| adaptive 2", "| oldest 2", "| adaptive against", "| oldest 2"]
    sharing, oldest = (scored[setting]["J&F"] for setting in ("adaptive-2", "oldest-2"))
    assert float(rows[-1][1].split()[0]) == pytest.approx(sharing - oldest, abs=0.06)  # ahead by, rounded
    assert (tmp_path / "plot.png").is_file()
