"""Signal to noise, clipping and histograms of layers, against NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.convert import convert, finalize, latent_weights
from qsam2.recipe import build_recipe
from qsam2.recipe.quantize import ConvertedLayer
from qsam2.report.layer_statistics import BINS, measure_layers

BATCH = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.kept = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept(self.second(self.first(x)))


def run(model: nn.Module) -> object:
    return model(BATCH)


MINMAX = {"method": "minmax", "bits": 4}


def toys(**quantize: object) -> tuple[nn.Module, nn.Module, dict, dict]:
    """With these quantizers: a finalized toy, its float twin, its latent weights and what was measured."""
    torch.manual_seed(0)
    model = Toy().eval()
    with torch.no_grad():
        model.first.weight[0, 0] = 4.0  # clipped by methods that clip
    teacher = copy.deepcopy(model)
    recipe = build_recipe({"quantize": {"rules": [{"match": "kept", "keep_float": True}], **quantize}})
    rows = convert(model, recipe.quantize)
    find_ranges(model, lambda batch: model(batch), [BATCH])
    latent = latent_weights(model)
    finalize(model)
    return model, teacher, latent, measure_layers(rows, model, teacher, latent, run)


def decibels(signal: np.ndarray, quantized: np.ndarray) -> float:
    return 10 * np.log10((signal**2).sum() / ((signal - quantized) ** 2).sum())


def test_weights_and_inputs_agree_with_numpy() -> None:
    model, teacher, latent, measured = toys(weights={**MINMAX, "bits": 3}, activations=MINMAX)
    rows = {row["name"]: row for row in measured["layers"]}
    with torch.no_grad():
        inputs = {"first": BATCH, "second": model.first(BATCH)}
    for name, x in inputs.items():
        layer = getattr(model, name)
        before, after = getattr(teacher, name).weight.detach().numpy(), layer.weight.detach().numpy()
        np.testing.assert_array_equal(latent[name].numpy(), before)
        assert rows[name]["weight_snr_db"] == pytest.approx(decibels(before, after), rel=1e-4)
        assert rows[name]["scale"] == pytest.approx(float(layer.weight_quantizer.scale.mean()))
        scale, zero = float(layer.input_quantizer.scale), float(layer.input_quantizer.zero_point)
        quantized = (np.clip(np.round(x.numpy() / scale) + zero, 0, 15) - zero) * scale
        assert rows[name]["input_snr_db"] == pytest.approx(decibels(x.numpy(), quantized), rel=1e-3)
    assert rows["kept"].keys() == {"name", "kind", "weight_bits", "activation_bits", "reason"}


def test_what_lies_beyond_the_grid_is_counted() -> None:
    model, teacher, latent, _ = toys(weights={**MINMAX, "bits": 3})
    latent["first"] = latent["first"] * torch.linspace(0.5, 2, 6)
    measured = measure_layers([ConvertedLayer("first", "Linear", 3, None, "")], model, teacher, latent, run)
    codes = latent["first"].numpy() / model.first.weight_quantizer.scale.numpy()[:, None]
    outside = (codes < -4.5) | (codes > 3.5)
    assert outside.any() and measured["layers"][0]["weight_clipped"] == pytest.approx(outside.mean())
    assert measured["inputs"] == []


def test_histograms_count_every_value_on_the_grid_and_measuring_changes_nothing() -> None:
    model, teacher, _, measured = toys(weights={**MINMAX, "granularity": "tensor"}, activations=MINMAX)
    weights, inputs = ({row["layer"]: row for row in measured[kind]} for kind in ("weights", "inputs"))
    assert weights.keys() == inputs.keys() == {"first", "second"}
    row = weights["first"]
    assert row["levels"] == [-8, 7] and row["reach"] == [-11.75, 10.75] and row["bits"] == 4
    codes = teacher.first.weight.detach().numpy() / float(model.first.weight_quantizer.scale)
    expected, _ = np.histogram(np.clip(codes, *row["reach"]), BINS, row["reach"])
    off = np.abs(np.cumsum(row["before"]) - np.cumsum(expected) / expected.sum())
    assert off.max() < 1.01 / expected.sum() and np.count_nonzero(off > 1e-4) <= 2  # a value on the edge of its bin
    assert row["before"] == row["after"]  # nothing was trained
    for row in (*weights.values(), *inputs.values()):
        assert sum(row["before"]) == pytest.approx(1, abs=1e-4) and sum(row["after"]) == pytest.approx(1, abs=1e-4)
    assert inputs["first"]["before"] == inputs["first"]["after"]
    assert inputs["second"]["before"] != inputs["second"]["after"]  # the float model's own inputs
    assert not any(module._forward_hooks for network in (model, teacher) for module in network.modules())
    assert torch.equal(model.first.weight, model.first.weight_quantizer(model.first.weight))


def test_noise_is_measured_after_what_stands_before_the_grid() -> None:
    """DoReFa squashes weights before it rounds them: that is no noise of the rounding."""
    model, teacher, latent, measured = toys(weights={"method": "dorefa", "bits": 8})
    np.testing.assert_allclose(latent["first"].numpy(), np.tanh(teacher.first.weight.detach().numpy()), rtol=1e-5)
    row = next(row for row in measured["layers"] if row["name"] == "first")
    assert row["weight_snr_db"] > 30


def test_weights_without_noise_have_no_figure() -> None:
    model, teacher, latent, _ = toys(weights={**MINMAX, "bits": 3})
    latent = {name: getattr(model, name).weight.detach() for name in latent}
    rows = [ConvertedLayer(name, "Linear", 3, None, "") for name in latent]
    measured = measure_layers(rows, model, teacher, latent, run)
    assert [row["weight_snr_db"] for row in measured["layers"]] == [None, None] and measured["weights"] == []
