"""Signal to noise, clipping and histograms of layers, against NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable

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


@pytest.fixture
def toys() -> Callable[..., tuple[nn.Module, nn.Module, dict, dict]]:
    """Given quantizers, a finalized toy, its float twin, its latent weights and what was measured."""

    def build(**quantize: object) -> tuple[nn.Module, nn.Module, dict, dict]:
        torch.manual_seed(0)
        model = Toy().eval()
        with torch.no_grad():
            model.first.weight[0, 0] = 4.0  # clipped by methods that clip
        teacher = copy.deepcopy(model)
        recipe = build_recipe({"quantize": {"rules": [{"match": "kept", "keep_float": True}], **quantize}})
        assert recipe.quantize is not None
        rows = convert(model, recipe.quantize)
        find_ranges(model, lambda batch: model(batch), [BATCH])
        latent = latent_weights(model)
        finalize(model)
        return model, teacher, latent, measure_layers(rows, model, teacher, latent, run)

    return build


def decibels(signal: np.ndarray, quantized: np.ndarray) -> float:
    return 10 * np.log10((signal**2).sum() / ((signal - quantized) ** 2).sum())


def test_weights_and_inputs_agree_with_numpy(toys: Callable) -> None:
    spec = {"method": "minmax", "bits": 3}
    model, teacher, latent, measured = toys(weights=spec, activations={"method": "minmax", "bits": 4})
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


def test_what_lies_beyond_the_grid_is_counted(toys: Callable) -> None:
    model, teacher, latent, _ = toys(weights={"method": "minmax", "bits": 3})
    latent["first"] = latent["first"] * torch.linspace(0.5, 2, 6)
    measured = measure_layers([ConvertedLayer("first", "Linear", 3, None, "")], model, teacher, latent, run)
    codes = latent["first"].numpy() / model.first.weight_quantizer.scale.numpy()[:, None]
    outside = (codes < -4.5) | (codes > 3.5)
    assert outside.any() and measured["layers"][0]["weight_clipped"] == pytest.approx(outside.mean())
    assert measured["inputs"] == []


def test_histograms_count_every_value_on_the_grid(toys: Callable) -> None:
    spec = {"method": "minmax", "bits": 4, "granularity": "tensor"}
    model, teacher, _, measured = toys(weights=spec, activations={"method": "minmax", "bits": 4})
    assert (
        {row["layer"] for row in measured["weights"]}
        == {row["layer"] for row in measured["inputs"]}
        == {"first", "second"}
    )
    row = next(row for row in measured["weights"] if row["layer"] == "first")
    assert row["levels"] == [-8, 7] and row["reach"] == [-11.75, 10.75] and row["bits"] == 4
    codes = teacher.first.weight.detach().numpy() / float(model.first.weight_quantizer.scale)
    expected, _ = np.histogram(np.clip(codes, *row["reach"]), BINS, row["reach"])
    off = np.abs(np.cumsum(row["before"]) - np.cumsum(expected) / expected.sum())
    assert off.max() < 1.01 / expected.sum() and np.count_nonzero(off > 1e-4) <= 2  # a value on the edge of its bin
    assert row["before"] == row["after"]  # nothing was trained
    for kind in ("weights", "inputs"):
        for row in measured[kind]:
            assert sum(row["before"]) == pytest.approx(1, abs=1e-4) and sum(row["after"]) == pytest.approx(1, abs=1e-4)
    first = next(row for row in measured["inputs"] if row["layer"] == "first")
    second = next(row for row in measured["inputs"] if row["layer"] == "second")
    assert first["before"] == first["after"] and second["before"] != second["after"]  # the float model's own inputs


def test_noise_is_measured_after_what_stands_before_the_grid(toys: Callable) -> None:
    """DoReFa squashes weights before it rounds them: that is no noise of the rounding."""
    model, teacher, latent, measured = toys(weights={"method": "dorefa", "bits": 8})
    np.testing.assert_allclose(latent["first"].numpy(), np.tanh(teacher.first.weight.detach().numpy()), rtol=1e-5)
    row = next(row for row in measured["layers"] if row["name"] == "first")
    assert row["weight_snr_db"] > 30


def test_measuring_changes_nothing(toys: Callable) -> None:
    model, teacher, _, _ = toys(weights={"method": "minmax", "bits": 3}, activations={"method": "minmax", "bits": 4})
    assert not any(module._forward_hooks for network in (model, teacher) for module in network.modules())
    assert torch.equal(model.first.weight, model.first.weight_quantizer(model.first.weight))


def test_weights_without_noise_have_no_figure(toys: Callable) -> None:
    model, teacher, latent, _ = toys(weights={"method": "minmax", "bits": 3})
    latent = {name: getattr(model, name).weight.detach() for name in latent}
    rows = [ConvertedLayer(name, "Linear", 3, None, "") for name in latent]
    measured = measure_layers(rows, model, teacher, latent, run)
    assert [row["weight_snr_db"] for row in measured["layers"]] == [None, None] and measured["weights"] == []
