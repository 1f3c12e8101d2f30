"""Whose run a folder holds: the same recipe resumes, also one that was written before the recipe had all its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qsam2.errors import UserError
from qsam2.recipe import build_recipe
from qsam2.run import RunFolder


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A recipe whose run has begun in its folder."""
    values = {"output": str(tmp_path / "run"), "quantize": {"weights": {"method": "lsc", "bits": 4}}, "train": {}}
    folder = RunFolder(build_recipe(values))
    folder.record("bytes", {})
    return values


def rewrite(values: dict[str, Any], change: Any) -> None:
    """Change the recipe that a run's folder holds."""
    file = Path(values["output"]) / "recipe.yaml"
    written = yaml.safe_load(file.read_text())
    change(written)
    file.write_text(yaml.safe_dump(written))


def test_keys_that_were_added_since_have_their_defaults(values: dict[str, Any]) -> None:
    rewrite(
        values, lambda recipe: (recipe["trainer"].pop("compile"), recipe["train"].pop("dropout"), recipe.pop("log"))
    )
    assert RunFolder(build_recipe(values)).metrics["bytes"] == {}
    rewrite(values, lambda recipe: recipe["trainer"].pop("compile"))
    with pytest.raises(UserError, match=r"holds a run of another recipe \(it differs in trainer.compile\)"):
        RunFolder(build_recipe(values, ["trainer.compile=on"]))


def test_another_recipe_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"differs in quantize.weights.bits, train.lr\); give another folder"):
        RunFolder(build_recipe(values, ["quantize.weights.bits=3", "train.lr=1"]))


def test_a_run_of_a_version_that_had_other_keys_is_refused(values: dict[str, Any]) -> None:
    rewrite(values, lambda recipe: recipe.update(gone=1))
    with pytest.raises(UserError, match=r"another version \(unknown recipe key 'gone'.*\); give output=PATH"):
        RunFolder(build_recipe(values))


def test_what_never_began_is_replaced(values: dict[str, Any]) -> None:
    (Path(values["output"]) / "metrics.json").unlink()
    RunFolder(build_recipe(values, ["quantize.weights.bits=3"]))
    assert "bits: 3" in (Path(values["output"]) / "recipe.yaml").read_text()
