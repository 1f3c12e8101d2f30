"""`qsam2 train --dry-run`: keys, layers and time of a run that is not carried out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_datasets import film, rle, save

from qsam2.cli import main

SMALL = ["model.image_size=64", "trainer.accelerator=cpu"]
TRAIN = ["debug=fast", "data.train=moving_objects:2:train", "data.val=moving_objects:1:val"]
VAL = ["data.val=moving_objects:1:val"]
FLOAT = "quantize: null\ntrain: null\ncalibrate: {stills: 500, clips: 500}\n"  # a float run needs no calibration data
QAT = "quantize: {weights: {method: minmax, bits: 4}}\ntrain: {}\n"
LAYER = "image_encoder.trunk.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("text", "data", "said", "calibrates"),
    [
        (QAT, TRAIN, ["image_size: 64", LAYER, "training ", "scoring "], True),
        (FLOAT, VAL, [" min: scoring "], False),
    ],
)
def test_a_dry_run_writes_nothing(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], text: str, data: list[str], said: list[str],
    calibrates: bool,
) -> None:  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{text}output: {tmp_path / 'run'}\n")
    assert main(["train", str(recipe), "--dry-run", *SMALL, f"model.checkpoint={checkpoint}", *data]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in [*said, str(tmp_path / "run")])
    assert (" min: calibration " in printed) == ("calibration " in printed.split("\n\n")[-2]) == calibrates
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_recipe_that_cannot_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: {weights: {method: minmax, bits: 4}, rules: [{match: nothing.*, bits: 8}]}\n")
    assert main(["train", str(recipe), "--dry-run", *SMALL, "model.checkpoint=null", *TRAIN[:2]]) == 2
    assert "nothing.*" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qat_w4a4_sam2", "qat_w2a4_sam2"])
def test_the_recipes_of_official_sizes_dry_run_on_their_layouts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights, one picture of SA-1B and one video of each split of SA-V."""
    picture, mask = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), bool)
    mask[16:48, 16:64] = True
    save(tmp_path / "sa1b/sa_1.jpg", picture)
    save(tmp_path / "sa1b/sa_1.json", {"annotations": [{"segmentation": rle(mask)}]})
    film(tmp_path / "sav/sav_000/sav_1.mp4", [picture] * 36)
    masklet = {"video_id": "sav_1", "masklet": [[rle(mask)]] * 9, "video_height": 64.0, "video_width": 96.0}
    save(tmp_path / "sav/sav_000/sav_1_manual.json", masklet)
    for index in range(4):
        save(tmp_path / f"sav/sav_val/JPEGImages_24fps/v/{index:05d}.jpg", picture)
    save(tmp_path / "sav/sav_val/Annotations_6fps/v/000/00000.png", mask.astype(np.uint8) * 255)
    save(tmp_path / "sav/sav_val/sav_val.txt", "v\n")
    monkeypatch.setenv("QSAM2_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    few = ["model.checkpoint=null", "calibrate.stills=2", "calibrate.clips=2", "trainer.precision=32-true"]
    assert main(["train", name, "--dry-run", *few, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "size: tiny" in printed and "kind: stills" in printed and "method: block_ap" in printed
    assert "reconstruction is not counted" in printed
