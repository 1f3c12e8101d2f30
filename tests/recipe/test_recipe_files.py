"""Every recipe that comes with qsam2 fits the schema and runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe, load_recipe, save_recipe
from qsam2.recipe.load import SIZES, Kind, shipped
from qsam2.recipe.train import PromptRecipe
from qsam2.sweep.definition import load_sweep
from qsam2.sweep.table import load_table

RECIPES = shipped("recipe")
SMALL = (
    "debug=fast",
    "model.size=nano",
    "model.checkpoint=null",
    "model.image_size=64",
    "data.train=moving_objects:2:train",
    "data.weights=null",
    "data.val=moving_objects:1:val",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
)


META = {"lr": 5e-6, "image_encoder_lr": 3e-6, "layer_decay": 0.9}
NANO = {"lr": 1e-4, "image_encoder_lr": 1e-4, "layer_decay": 1.0}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RECIPES)
def test_fits_the_schema(name: str, size: str) -> None:
    recipe = load_recipe(name, [f"model.size={size}"])
    assert recipe.name.replace("-", "_") == Path(name).name
    assert RECIPES[name].read_text().startswith("# "), "a recipe begins with a comment that says what it shows"
    if named := re.search(r"_w(\d)a(\d)", name):
        assert (recipe.quantize.weights.bits, recipe.quantize.activations.bits) == (int(named[1]), int(named[2]))
    if name.startswith(("ptq", "qat")):
        assert (recipe.train is not None) == name.startswith("qat")
    assert build_recipe(yaml.safe_load(save_recipe(recipe))) == recipe  # resolved: neither base nor sizes


@pytest.mark.parametrize(("kind", "load"), [("sweep", load_sweep), ("table", load_table)])
def test_sweeps_and_tables_fit_theirs(kind: Kind, load: Callable[[str], Any]) -> None:
    for name, file in shipped(kind).items():
        assert load(name) and file.read_text().startswith("# ")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "scale"),
    [("qat_w4a4", 1), ("qat_mixed", 1), ("qat_w2a4", 3), ("qat_w4a4_sam2", 1), ("qat_w2a4_sam2", 3)],
)
def test_official_sizes_train_as_meta_does_and_nano_as_it_was_pretrained(name: str, scale: int, size: str) -> None:
    recipe, nano = load_recipe(name, [f"model.size={size}"]), size.startswith("nano")
    rates = NANO if nano else META
    expected = {key: value if key == "layer_decay" else pytest.approx(scale * value) for key, value in rates.items()}
    assert {key: getattr(recipe.train, key) for key in rates} == expected
    assert (recipe.train.prompts == PromptRecipe()) != nano
    assert (recipe.data.num_frames, recipe.data.max_objects) == ((4, 2) if nano else (8, 3))
    assert recipe.trainer.gradient_clip == (1.0 if nano else 0.1)
    assert recipe.train.distill.mask_logits == 20.0 and recipe.calibrate.weights.method == "frobenius"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "demo_nearest" else pytest.mark.prove) for n in RECIPES if "/" not in n]
)
@pytest.mark.slow
def test_runs_for_two_steps(name: str, tmp_path: Path) -> None:
    reconstructs = load_recipe(name).reconstruct is not None
    few = ["reconstruct.blocks=[image_encoder.neck, obj_ptr_proj]"] if reconstructs else []
    if name.endswith("_sam2"):  # on its own data
        few += ["train.stages=[{kind: stills, batch_size: 2}, {}, {num_frames: 3}]", "evaluate.protocol=davis"]
    recipe = load_recipe(name, [*SMALL, *few, f"output={tmp_path}"])
    assert {stage.trainer.max_steps for stage in recipe.training} <= {2}
    metrics = run_recipe(recipe)
    models = {"float", "ptq", "quantized"} if recipe.quantize else {"float"}
    assert models <= metrics.keys()
    assert len(recipe.training) <= 1 or (tmp_path / "checkpoints" / "2-last.ckpt").is_file()
    assert (len(recipe.training) == 1) == (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "report.html").is_file()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == ("qsam2-packed" if recipe.quantize else "qsam2-float")
