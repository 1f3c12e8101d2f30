"""`calibrate.weights` in whole runs: what changes, what does not, and what is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from qsam2.calibration.weights import calibrate_weights
from qsam2.errors import UserError
from qsam2.evaluation import scoring
from qsam2.formats.packed import load_packed
from qsam2.loading import load_model
from qsam2.models import load_sam2
from qsam2.pipeline import begin, run_recipe
from qsam2.recipe import Recipe, build_recipe
from qsam2.run import RunFolder

pytestmark = pytest.mark.slow

VALUES: dict[str, Any] = {
    "debug": "fast",
    "model": {"size": "nano_heavy", "image_size": 64},
    "data": {"train": "moving_objects:4:train", "val": "moving_objects:1:val"},
    "quantize": {"weights": {"method": "minmax", "bits": 4}, "activations": {"method": "minmax", "bits": 8}},
    "trainer": {"accelerator": "cpu", "devices": 1},
}


BLOCK_0 = ("calibrate.weights.method=frobenius", "calibrate.weights.layers=['*.blocks.0.*']")


def recipe(folder: Path, *overrides: str) -> Recipe:
    return build_recipe({**VALUES, "output": str(folder)}, overrides)


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight for name, layer in model.named_modules() if type(layer) is nn.Linear}


def calibrated(given: Recipe) -> tuple[nn.Module, RunFolder, set[str]]:
    """The model after the stage, the run's folder, and the names of the layers whose weights it changed."""
    run = begin(given, RunFolder(given))
    before = copy.deepcopy(linear_weights(run.model))
    calibrate_weights(run)
    after = linear_weights(run.model)
    return run.model, run.folder, {name for name, weight in after.items() if not torch.equal(weight, before[name])}


def test_a_run_says_what_became_of_each_layer(tmp_path: Path) -> None:
    metrics = run_recipe(recipe(tmp_path, *BLOCK_0))
    written = json.loads((tmp_path / "metrics.json").read_text())["calibrated_weights"]
    assert written["method"] == "frobenius" and len(written["layers"]) == 4
    layer = written["layers"]["image_encoder.trunk.blocks.0.attn.qkv"]
    assert layer["quantized_error"][1] < layer["quantized_error"][0] / 2
    assert list(metrics["seconds"])[:2] == ["calibrate weights", "convert"]
    assert (tmp_path / "report.html").read_text().count("blocks.0.attn.qkv</th><td>4</td><td>") == 1
    assert "method: frobenius" in (tmp_path / "recipe.yaml").read_text()


def test_weights_scales_ranges_and_rounding_combine(tmp_path: Path) -> None:
    metrics = run_recipe(recipe(tmp_path, *BLOCK_0, "calibrate.smooth=[0.3, 0.5]", "calibrate.rounding=gptq"))
    assert list(metrics["seconds"])[:6] == [
        *("calibrate weights", "smooth", "convert", "score float", "calibrate", "round weights")
    ]
    assert len(metrics["calibrated_weights"]["layers"]) == 4
    for row in metrics["smoothed"].values():
        assert row["alpha"] in (None, 0.3, 0.5) and row["error"][1] <= row["error"][0]
    assert metrics["rounded"]["method"] == "gptq" and len(metrics["rounded"]["layers"]) > 100
    assert all(row["error"][1] <= row["error"][0] for row in metrics["rounded"]["layers"].values())
    fresh = load_sam2("nano_heavy", image_size=64)
    load_packed(tmp_path / "model.safetensors", fresh)
    assert metrics["quantized"]["J&F"] == metrics["ptq"]["J&F"]


def test_training_starts_from_the_integers_of_calibration(tmp_path: Path) -> None:
    """A step that moves next to nothing leaves them, and the biases that go with them."""
    rules = "quantize.rules=[{match: '*.blocks.0.*', weight_bits: 3}, {match: '*', keep_float: true}]"
    start = [rules, "calibrate.rounding=gptq", "calibrate.smooth=0.5", "quantize.weights.method=lsq"]
    still = "train={lr: 1e-12, image_encoder_lr: 1e-12, quantizer_lr: 1e-12}"
    run_recipe(recipe(tmp_path / "ptq", *start))
    metrics = run_recipe(recipe(tmp_path / "qat", *start, still, "trainer.max_steps=1", "data.num_workers=0"))
    chosen = [name for name, row in metrics["rounded"]["layers"].items() if row["damping"] > 0]
    ptq, qat = (dict(load_model(tmp_path / name)[0].named_parameters()) for name in ("ptq", "qat"))
    for name in (f"{layer}.{part}" for layer in chosen for part in ("weight", "bias")):
        torch.testing.assert_close(qat[name], ptq[name], rtol=1e-4, atol=1e-6)
    assert chosen


def test_the_float_reference_is_the_model_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(scoring, "score", scored)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, *BLOCK_0))
    _, model, name, *_ = scored.call_args.args
    expected = linear_weights(load_sam2("nano_heavy", image_size=64))
    assert name == "float"
    assert all(torch.equal(weight, expected[key]) for key, weight in linear_weights(model).items())


def test_acnr_and_layers_beyond_the_image_encoder(tmp_path: Path) -> None:
    given = recipe(tmp_path, "calibrate.weights={method: acnr, layers: [memory_attention.*, '*.blocks.0.attn.qkv']}")
    _, folder, changed = calibrated(given)
    rows = folder.metrics["calibrated_weights"]["layers"]
    assert changed <= rows.keys() and {name.split(".")[0] for name in rows} == {"image_encoder", "memory_attention"}
    assert all(row["quantized_error"][1] <= row["quantized_error"][0] for row in rows.values())


def test_it_is_the_same_each_time_and_without_it_nothing_changes(tmp_path: Path) -> None:
    given = recipe(tmp_path, "calibrate.weights.method=frobenius", "calibrate.weights.layers=['*.blocks.3.*']")
    (one, _, changed), (two, _, _) = calibrated(given), calibrated(given)
    assert changed and all(".blocks.3." in name for name in changed)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    _, folder, changed = calibrated(recipe(tmp_path / "without"))
    assert not changed and "calibrated_weights" not in folder.metrics


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibrate.weights=frob"], "calibrate.weights.method='frob' is unknown: give frobenius or acnr"),
        (["calibrate.weights={method: acnr, rhos: [1]}"], "unknown recipe key 'calibrate.weights.rhos': calibrate.wei"),
        (["calibrate.weights={method: frobenius, rhos: [-1]}"], "calibrate.weights.rhos.0=-1: should be greater than"),
        (["calibrate.weights={method: acnr, steps: [0.5]}"], "calibrate.weights.steps.0=0.5: should be a valid int"),
        (["calibrate.weights=acnr", "calibrate.clips=1"], "calibrate: clips=1 is too few: weights are fitted on"),
        (["calibrate.rounding=gptq", "calibrate.clips=1"], "calibrate: clips=1 is too few: what is fitted on one half"),
        (["calibrate.smooth=[0.3, 0.5]", "calibrate.clips=1"], "calibrate: clips=1 is too few: what is fitted on"),
        (["calibrate.rounding=gpt"], "calibrate.rounding.method='gpt' is unknown: give gptq or nearest"),
        (["calibrate.rounding={method: gptq, damping: 0}"], "calibrate.rounding.damping.0=0: should be greater"),
        (["calibrate.rounding={method: gptq, damping: []}"], r"calibrate.rounding.damping=\[\]: "),
        (["calibrate.rounding={method: nearest, damping: 1}"], "unknown recipe key 'calibrate.rounding.damping'"),
        (["calibrate.smooth=2"], "calibrate.smooth.0=2: should be less than or equal to 1"),
        (["calibrate.smooth=[]"], r"calibrate.smooth=\[\]: "),
        (["calibrate.stills=-1"], "calibrate.stills=-1: should be greater than or equal to 0"),
        (["calibrate.smooth=true"], "calibrate.smooth=True: should be a number, not true or false"),
        (["calibrate.smooth=auto"], "calibrate.smooth='auto': give a number from 0 to 1"),
        (["calibrate.rounding=gptq", "quantize.weights=null"], "recipe: calibrate.rounding=gptq needs quantized"),
        (
            ["calibrate.rounding=gptq", "train={}", "quantize.weights.method=dorefa"],
            "recipe: calibrate.rounding=gptq starts training in the cells of its integers, but dorefa rounds the tanh",
        ),
        (["calibrate.smooth=0.5", "quantize.activations=null"], "recipe: calibrate.smooth needs quantized activations"),
        (["calibrate.weights=acnr", "quantize.weights=null"], "recipe: calibrate.weights=acnr needs quantized"),
        (["calibrate.weights=acnr", "quantize=null"], "recipe: calibrate.weights=acnr needs quantized weights: give"),
    ],
)
def test_recipe_messages(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        recipe(tmp_path, *overrides)


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    given = recipe(tmp_path, "calibrate.weights=frobenius", "calibrate.smooth=0.5", "calibrate.rounding=gptq")
    assert build_recipe(given.model_dump(mode="json")) == given
    assert given.calibrate.smooth == (0.5,) and given.calibrate.rounding is not None
    assert given.calibrate.weights is not None and given.calibrate.weights.strengths[:2] == (0, 1e-6)
