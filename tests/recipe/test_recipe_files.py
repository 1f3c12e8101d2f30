"""Every recipe that comes with qsam2 fits the schema and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

import qsam2
from qsam2.pipeline import run_recipe
from qsam2.recipe import load_recipe

RECIPES = sorted((Path(qsam2.__file__).parents[1] / "recipes").glob("*.yaml"))
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


def test_the_recipes_of_the_readme_are_there() -> None:
    expected = {"demo", "pretrain_nano", "qat_w4a4", "qat_w2a4", "ptq_w8a8", "ptq_w4a4"}
    assert {path.stem for path in RECIPES} >= expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_fits_the_schema(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name.replace("-", "_") == path.stem
    assert path.read_text().startswith("# "), "a recipe begins with a comment that says what it shows"
    given = yaml.safe_load(path.read_text())
    resolved = recipe.model_dump(mode="json")
    assert given.keys() <= resolved.keys()
    bits = {part: spec["bits"] for part, spec in (given.get("quantize") or {}).items() if "bits" in spec}
    if named := re.search(r"_w(\d)a(\d)", path.stem):
        assert bits == {"weights": int(named[1]), "activations": int(named[2])}
    if path.stem.startswith(("ptq", "qat")):
        assert (recipe.train is not None) == path.stem.startswith("qat")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == "demo" else pytest.mark.prove, id=path.stem) for path in RECIPES],
)
@pytest.mark.slow
def test_runs_for_two_steps(path: Path, tmp_path: Path) -> None:
    reconstructs = load_recipe(path).reconstruct is not None
    few = ["reconstruct.blocks=[image_encoder.neck, obj_ptr_proj]"] if reconstructs else []
    recipe = load_recipe(path, [*SMALL, *few, f"output={tmp_path}"])
    assert recipe.trainer.max_steps == 2
    metrics = run_recipe(recipe)
    models = {"float", "ptq", "quantized"} if recipe.quantize else {"float"}
    assert models <= metrics.keys()
    assert (recipe.train is not None) == (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "report.html").is_file()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == ("qsam2-packed" if recipe.quantize else "qsam2-float")
