"""Whole QAT runs with averaged weights, stochastic depth and distillation: their file is the model that they scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TRAIN, small

import qsam2
from qsam2 import loading
from qsam2.evaluation.scoring import evaluate_model
from qsam2.formats import packed
from qsam2.layers.convert import finalize, quantizers
from qsam2.loading import load_float, load_model
from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe

QAT = {**TRAIN, "ema": 0.9, "drop_path": 0.3, "dropout": 0.1, "freeze_statistics_at": 1.0}


def values_of(method: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """A recipe of six steps, in which an average of 7 over and over would no longer be 7."""
    spec = {"method": method, "bits": 4, "range": "minmax"}
    steps = {"max_steps": 6, "checkpoint_every": 3}
    return small(checkpoint, folder, quantize={"weights": spec, "activations": spec}, train=QAT, trainer=steps)


@pytest.mark.parametrize("method", ["lsq", "lsc", "lsq_plus"])
def test_an_averaged_run_loads_and_scores_as_it_did(method: str, checkpoint: Path, tmp_path: Path) -> None:
    recipe = build_recipe(values_of(method, checkpoint, tmp_path / "run"))
    figures = run_recipe(recipe)["quantized"]
    model, _ = load_model(tmp_path / "run")
    zero_points = torch.cat([quantizer.zero_point for _, quantizer in quantizers(model)])
    assert torch.equal(zero_points, zero_points.round()) and zero_points.count_nonzero() > 0

    trained = load_float(recipe)
    packed.convert(trained, recipe.quantize)
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    finalize(trained)
    assert packed.differing(model, trained) == []

    again = evaluate_model(str(tmp_path / "run"))
    assert {key: again[key] for key in ("J&F", "J", "F")} == {key: figures[key] for key in ("J&F", "J", "F")}
    assert again["per_object"] == figures["per_object"]
    assert isinstance(qsam2.load(tmp_path / "run"), qsam2.models.SAM2)


DAMAGE = {
    ("a value", True): "differs from the model in maskmem_tpos_enc",
    ("a scale", True): r"differs from the model in image_encoder\S+\.scale",
    ("a value", False): "differs from the model in maskmem_tpos_enc",
    ("unreadable", False): "cannot be loaded: a damaged file",
}


@pytest.mark.parametrize(("damage", "quantized"), DAMAGE)
def test_a_run_whose_file_is_not_its_model_does_not_finish(
    damage: str, quantized: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of("lsq", checkpoint, tmp_path / "run") | {"train": None}
    if not quantized:
        values |= {"quantize": None}
    load = load_model

    def load_another(*args: Any) -> Any:
        model, recipe = load(*args)
        with torch.no_grad():
            if damage == "a value":
                model.maskmem_tpos_enc[0, 0, 0, 0] += 1.0
            elif damage == "a scale":
                next(quantizers(model))[1].frozen_scale.mul_(1.0001)
            else:
                raise qsam2.errors.UserError("a damaged file")
        return model, recipe

    monkeypatch.setattr(loading, "load_model", load_another)
    with pytest.raises(RuntimeError, match=f"the file that this run wrote is removed: it {DAMAGE[damage, quantized]}"):
        run_recipe(build_recipe(values))
    assert not (tmp_path / "run/report.html").exists() and not (tmp_path / "run/model.safetensors").exists()
    monkeypatch.undo()
    run_recipe(build_recipe(values))
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("rate", ["lr", "image_encoder_lr"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_run_that_diverges_in_its_last_step_says_so(
    rate: str, quantized: bool, checkpoint: Path, tmp_path: Path
) -> None:
    values = values_of("lsq", checkpoint, tmp_path / "run")
    values["train"] = {**values["train"], "ema": None}
    values["trainer"]["max_steps"] = 1
    values["evaluate"]["after_calibration"] = False
    if not quantized:
        values |= {"quantize": None, "train": {**values["train"], "distill": {}}}
    with pytest.raises(qsam2.errors.UserError, match=rf"^training has diverged, .* lower .*train.{rate}=1e\+30"):
        recipe = build_recipe(values)
        train = recipe.train.model_copy(update={rate: 1e30})  # beyond what a recipe may say: one step is enough
        run_recipe(recipe.model_copy(update={"train": train}))
    assert not (tmp_path / "run/model.safetensors").exists()
