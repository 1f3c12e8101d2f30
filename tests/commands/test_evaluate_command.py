"""`qsam2 evaluate`: what is scored, and the JSON that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import write_stills

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.cli import main
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.formats.packed import save_packed
from qsam2.layers.convert import convert, finalize
from qsam2.loading import load_model
from qsam2.recipe import build_recipe

KEYS = {"protocol", "J&F", "J", "F", "J_recall", "J_decay", "F_recall", "F_decay", "scored", "left_out", "per_object"}
KEYS |= {"seconds_per_frame", "model", "fidelity"}
SIZE = "model.image_size=64"


@pytest.fixture(scope="module")
def run_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves for `evaluate`: 3-bit weights in `model.safetensors`."""
    values = {
        "quantize": {"weights": {"method": "minmax", "bits": 3}},
        "model": {"image_size": 64},
        "data": {"train": ["moving_objects:2:train"], "val": "moving_objects:1:val"},
        "evaluate": {"frames": 4, "protocol": "sav"},
    }
    model, _ = load_model(checkpoint, [SIZE])
    convert(model, build_recipe(values).quantize)
    find_ranges(model, lambda batch: None, [])
    finalize(model)
    folder = tmp_path_factory.mktemp("run")
    save_packed(folder / "model.safetensors", model, values)
    return folder


def scores(folder: Path, *words: object) -> dict[str, Any]:
    """The JSON of a command, which makes its folder; strict, without NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    out = folder / "new/scores=1.json"
    assert main(["evaluate", *map(str, words), "--json", str(out)]) == 0
    return json.loads(out.read_text(), parse_constant=refuse)


def test_videos(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", "moving_objects:2:val", "--frames", "4", "--videos", "1"]
    block = scores(tmp_path, checkpoint, SIZE, *flags)
    assert block.keys() == KEYS | {"precision"}
    assert (block["protocol"], block["model"], block["fidelity"]) == ("davis", str(checkpoint), None)
    video = moving_objects("val", 1)[0]
    assert {video.name: {str(i) for i in video.masks(0)}} == {v: set(o) for v, o in block["per_object"].items()}
    objects = [each for items in block["per_object"].values() for each in items.values()]
    for key in ("J&F", "J", "F"):
        assert block[key] == pytest.approx(np.mean([each[key] for each in objects]))
        assert 0 <= block[key] <= 100
    assert block["J"] > 0 and 0 < block["seconds_per_frame"] < 60
    line = capsys.readouterr().out.split("\n")[-2]  # Lightning's progress bars stand before it
    amount = f"1 video, 2 frames, {len(objects)} object{'s' if len(objects) > 1 else ''}"
    assert line == f"{checkpoint}: J&F {block['J&F']:.1f}, J {block['J']:.1f}, F {block['F']:.1f} ({amount})"
    assert (block["scored"], block["left_out"]) == ({"videos": 1, "frames": 2, "objects": len(objects)}, {})


def test_other_data_are_scored_as_a_whole_whatever_part_of_its_own_the_run_scored(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[int | None, int | None]] = []
    one_score = lambda *a, **_: parts.append((a[2].videos, a[2].frames)) or ({"J&F": 1.0}, {})  # noqa: E731
    monkeypatch.setattr("qsam2.evaluation.scoring.score_float", one_score)
    other = ["--data", "moving_objects:2:val"]
    for words in (other, [*other, "evaluate.frames=5"], [*other, "--videos", "1"], []):
        assert main(["evaluate", str(run_folder), *words]) == 0
    assert parts == [(None, None), (None, 5), (1, None), (None, 4)]


def test_a_reference(run_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own recipe says what to score on; the reference runs at the run's image size."""
    two = scores(tmp_path, run_folder, "--reference", checkpoint, "--data", "moving_objects:2:val", "--frames", "4")
    versus, line = two["versus_reference"], capsys.readouterr().out.split("\n")[-2]
    interval = f"{versus['difference']:+.1f} ({versus['low']:+.1f} to {versus['high']:+.1f})"
    note = f"95 % t interval over 2 videos, {versus['objects']} objects"
    assert line == f"J&F against the reference: {interval}, {note}"
    assert versus["low"] <= versus["difference"] <= versus["high"]
    block = scores(tmp_path, run_folder, "--reference", checkpoint)
    assert "(no interval: one video)" in capsys.readouterr().out.split("\n")[-2]
    assert block.keys() == KEYS | {"precision", "versus_reference"}
    assert (block["protocol"], block["model"]) == ("sav", str(run_folder)) and 0 < block["fidelity"] < 100
    flags = ["--data", "moving_objects:1:val", "--frames", "4", "--protocol", "sav"]
    turned = scores(tmp_path, checkpoint, SIZE, *flags, "--reference", run_folder / "model.safetensors")
    assert turned["fidelity"] == pytest.approx(block["fidelity"])
    found = block["versus_reference"]
    assert found["difference"] == pytest.approx(block["J&F"] - turned["J&F"])
    assert (found["low"], found["high"], found["videos"]) == (None, None, 1)
    assert found["objects"] == sum(map(len, block["per_object"].values()))


def test_stills(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = scores(tmp_path, checkpoint, SIZE, "--data", write_stills(tmp_path), "--reference", checkpoint)
    assert (block["protocol"], block["images"]) == ("stills", 2)
    assert (block["model"], block["fidelity"]) == (str(checkpoint), 100)
    assert block["versus_reference"]["point_IoU"]["difference"] == 0
    line = capsys.readouterr().out
    for key in ("point_mIoU", "box_mIoU"):
        assert 0 < block[key] <= 100 and f"{key} {block[key]:.1f}" in line
    for key in ("point_IoU", "box_IoU"):
        assert f"{key} against the reference: +0.0 (+0.0 to +0.0), 95 % t interval over 2 images" in line


def test_masks_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A square that is predicted one row too high."""
    for folder, top in (("gt", 10), ("pred", 9)):
        (tmp_path / folder / "cat").mkdir(parents=True)
        mask = np.zeros((64, 64), np.uint8)
        mask[top : top + 20, 10:30] = 1
        for index in range(4):
            Image.fromarray(mask, "L").save(tmp_path / folder / "cat" / f"{index:05d}.png")
    block = scores(tmp_path, "--pred", tmp_path / "pred", "--gt", tmp_path / "gt")
    assert block.keys() == KEYS
    assert (block["protocol"], block["seconds_per_frame"], block["fidelity"]) == ("davis", None, None)
    assert block["model"] == str(tmp_path / "pred")
    assert block["J"] == pytest.approx(100 * 19 / 21) and block["F"] == 100
    assert block["per_object"] == {"cat": {"1": {key: block[key] for key in ("J&F", "J", "F")}}}
    assert "J&F 95.2, J 90.5, F 100.0" in capsys.readouterr().out
