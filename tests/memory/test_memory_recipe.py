"""Keys of the recipe: what is allowed, what they do to a model, and that evaluation heeds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe import build_recipe, save_recipe
from qsam2.recipe.recipe import MemoryRecipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.sharing=adaptive", "memory.frames=0"], "memory.frames=0: should be greater than 0"),
        (["memory.sharing=oldest", "memory.frames=-1"], "memory.frames=-1: should be greater than 0"),
        (["memory.sharing=pool", "memory.frames=1.5"], "memory.frames=1.5: should be a valid integer"),
        (["memory.sharing=adaptive", "memory.quantile=1.5"], "memory.quantile=1.5: should be less than or equal to 1"),
        (["memory.sharing=adaptive", "memory.quantile=-1"], "memory.quantile=-1: should be greater than or equal to 0"),
        (["memory.sharing=oldest", "memory.frames=2", "memory.quantile=0.5"], "quantile=0.5 is for sharing=adaptive"),
        (["memory.sharing=adaptive"], "sharing=adaptive needs a key budget in frames: give frames=N or quantile=Q"),
        (["memory.sharing=sparse"], "sharing=sparse needs a key budget in frames: give frames=N"),
        (["memory.frames=3"], "frames=3 is a budget of sharing, which is none: give sharing=adaptive"),
        (["memory.sharing=newest"], "memory.sharing='newest': should be 'none', 'adaptive', 'oldest', 'stride'"),
        (["memory.cash=true"], "unknown recipe key 'memory.cash'"),
    ],
)
def test_impossible_values(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_recipe({}, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_defaults_are_those_of_sam2(model: SAM2) -> None:
    for cache, bounded in ((True, True), (False, False), (False, True)):
        use_memory(model, MemoryRecipe(cache=cache, bounded=bounded))
        assert (model.memory_reader is not None, model.memory_bound is not None) == (cache, bounded)


def test_a_recipe_with_memory_survives_its_file() -> None:
    recipe = build_recipe({}, ["memory.sharing=adaptive", "memory.quantile=0.5", "memory.bounded=true"])
    assert "sharing: adaptive" in save_recipe(recipe)
    assert recipe.memory == MemoryRecipe(sharing="adaptive", quantile=0.5, bounded=True)


def test_a_model_without_memory(model: SAM2) -> None:
    model.num_maskmem = 0
    use_memory(model, MemoryRecipe())
    for memory in ({"sharing": "adaptive", "frames": 2}, {"cache": True}, {"bounded": True}):
        with pytest.raises(UserError, match=r"this model has a memory of length 0 \(num_maskmem=0\)"):
            use_memory(model, MemoryRecipe(**memory))  # type: ignore[arg-type]


def test_evaluation_reads_memory_by_the_recipe(model: SAM2, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "nano.pt")
    given = ["evaluate", str(tmp_path / "nano.pt"), "--data", "moving_objects:1:val", "--frames", "5"]
    given += ["model.image_size=64", "trainer.accelerator=cpu", "--json", str(tmp_path / "out.json")]
    fidelity = {}
    for name, memory in {"cache": ["memory.cache=true", "memory.bounded=true"], "one": ["memory.frames=1"]}.items():
        more = ["memory.sharing=oldest"] if name == "one" else []
        assert main([*given, "--reference", str(tmp_path / "nano.pt"), *memory, *more]) == 0
        fidelity[name] = json.loads((tmp_path / "out.json").read_text())["fidelity"]
    assert fidelity["cache"] == pytest.approx(100, abs=0.1)  # equal but for rounding: the reference reads as sam2 does
    assert fidelity["one"] < 99
    assert main([*given, "memory.frames=0"]) == 2
