"""`qsam2 train --dry-run`: keys, layers and time of a run that is not carried out."""

from __future__ import annotations

from pathlib import Path

import pytest

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
