"""`qsam2 train --dry-run`: keys, layers and time of a run that is not carried out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import seeing

from qsam2.cli import main


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, checkpoint = tmp_path / "recipe.yaml", tmp_path / "nano.pt"
    recipe.write_text(f"quantize: {{weights: {{method: minmax, bits: 4}}}}\noutput: {tmp_path / 'run'}\n")
    torch.save({"model": seeing().state_dict()}, checkpoint)
    small = ["debug=fast", "model.image_size=64", f"model.checkpoint={checkpoint}", "trainer.accelerator=cpu"]
    data = ["data.train=moving_objects:2:train", "data.val=moving_objects:1:val"]
    before = sorted(tmp_path.iterdir())
    assert main(["train", str(recipe), "--dry-run", *small, *data]) == 0
    printed = capsys.readouterr().out
    assert "image_size: 64" in printed and "image_encoder.trunk.blocks.0.attn.qkv" in printed
    assert " min: calibration " in printed and "scoring " in printed and str(tmp_path / "run") in printed
    assert sorted(tmp_path.iterdir()) == before


def test_a_float_run_needs_no_calibration_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, checkpoint = tmp_path / "recipe.yaml", tmp_path / "nano.pt"
    recipe.write_text(
        f"quantize: null\ntrain: null\ncalibrate: {{stills: 500, clips: 500}}\noutput: {tmp_path / 'run'}\n"
    )
    torch.save({"model": seeing().state_dict()}, checkpoint)
    small = ["model.image_size=64", f"model.checkpoint={checkpoint}", "trainer.accelerator=cpu"]
    assert main(["train", str(recipe), "--dry-run", *small, "data.val=moving_objects:1:val"]) == 0
    printed = capsys.readouterr().out
    assert " min: scoring " in printed and "calibration " not in printed.split("\n\n")[-2]


def test_a_recipe_that_cannot_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: {weights: {method: minmax, bits: 4}, rules: [{match: nothing.*, bits: 8}]}\n")
    small = ["debug=fast", "model.image_size=64", "model.checkpoint=null", "trainer.accelerator=cpu"]
    assert main(["train", str(recipe), "--dry-run", *small, "data.train=moving_objects:2:train"]) == 2
    assert "nothing.*" in capsys.readouterr().err
