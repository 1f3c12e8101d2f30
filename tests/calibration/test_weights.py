"""Calibrated layers: the choice of strength on held-out data, the bias, which layers, and every message."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qsam2.calibration.frobenius import acnr
from qsam2.calibration.gram import LayerInputs, gather_inputs
from qsam2.calibration.weights import (
    CalibratedLayer,
    calibrate_layer,
    calibrate_layers,
    choose_layers,
    input_quantizers,
    output_energy,
    output_error,
)
from qsam2.errors import UserError
from qsam2.models import build_sam2
from qsam2.quantizers import Quantizer, build_quantizer
from qsam2.recipe.calibrate import ACNRRecipe, FrobeniusRecipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec

W4 = MinMaxSpec(bits=4)
METHODS = (FrobeniusRecipe(), ACNRRecipe())


def samples(count: int = 4, rows: int = 200, size: int = 16, seed: int = 0) -> list[Tensor]:
    """Inputs about a mean that, but for little, avoid one direction."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(size) + 0.3 * torch.randn(size, size, generator=generator)
    mix[:, 0] = mix[:, 1:].sum(dim=1) + 1e-3 * mix[:, 0]
    return [torch.randn(rows, size, generator=generator) @ mix + 2 for _ in range(count)]


def heavy_layer(size: int = 16, rows: int = 8, bias: bool = True) -> nn.Linear:
    """Weights that are large in the direction which the inputs avoid: 4 bits are too coarse for the others."""
    torch.manual_seed(0)
    layer = nn.Linear(size, rows, bias=bias)
    with torch.no_grad():
        empty = torch.tensor([1.0] + [-1.0] * (size - 1))
        layer.weight += 5 * torch.outer(torch.randn(rows), empty)
    return layer


def gathered(layer: nn.Linear, data: list[Tensor], quantizer: Quantizer | None = None) -> LayerInputs:
    quantizers = {"layer": quantizer} if quantizer else {}
    return gather_inputs({"layer": layer}, layer, data, len(data), quantizers)["layer"]


def calibrate(layer: nn.Linear, data: list[Tensor], method: Any, quantizer: Quantizer | None = None) -> CalibratedLayer:
    return calibrate_layer("layer", layer, gathered(layer, data, quantizer), W4, method)


@torch.no_grad()
def true_error(layer: nn.Linear, before: Tensor, x: Tensor, quantized: bool = True) -> float:
    """Mean squared difference to the outputs of before, over their variance, by running the layer."""
    weight = layer.weight
    if quantized:
        step = weight.abs().amax(1, keepdim=True) / 7
        weight = (weight / step).round().clamp(-7, 7) * step
    bias = 0 if layer.bias is None else layer.bias
    error = x @ weight.T + bias - before
    energy = before - before.mean(0) if layer.bias is not None else before
    return float(error.square().sum(1).mean() / energy.square().sum(1).mean())


@pytest.mark.parametrize("bias", [True, False])
def test_the_errors_are_those_of_the_quantized_layer_on_held_out_data(bias: bool) -> None:
    layer, data = heavy_layer(bias=bias), samples()
    held_out = torch.cat(data[2:])
    before, old = layer(held_out).detach(), true_error(layer, layer(held_out).detach(), held_out)
    row = calibrate(layer, data, FrobeniusRecipe())
    assert row.strength > 0
    np.testing.assert_allclose(row.quantized_error[0], old, rtol=1e-3)
    np.testing.assert_allclose(row.quantized_error[1], true_error(layer, before, held_out), rtol=1e-3)
    np.testing.assert_allclose(row.float_error, true_error(layer, before, held_out, False), rtol=1e-2, atol=1e-9)
    assert row.quantized_error[1] < row.quantized_error[0] / (20 if bias else 2)
    assert row.std[1] < row.std[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_none_on_held_out_data(method: Any, seed: int) -> None:
    torch.manual_seed(seed)
    layer, data = nn.Linear(16, 8), samples(seed=seed)
    row = calibrate(layer, data, method)
    assert row.errors[0] == row.quantized_error[0] and min(row.errors.values()) == row.quantized_error[1]
    assert row.errors.keys() == set(method.strengths) and row.strength in row.errors


def test_a_grid_without_zero_has_it_and_weights_that_gain_nothing_stay() -> None:
    method = FrobeniusRecipe(rhos=(100.0,))
    assert method.strengths == (0, 100.0) and ACNRRecipe(steps=(7, 2)).strengths == (0, 2, 7)
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    row = calibrate(layer, samples(), method)
    assert row.strength == 0 and row.float_error == 0
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_the_choice_is_made_at_the_bits_of_the_recipe() -> None:
    strengths = {}
    for bits in (2, 8):
        layer = heavy_layer()
        row = calibrate_layer("layer", layer, gathered(layer, samples()), MinMaxSpec(bits=bits), FrobeniusRecipe())
        strengths[bits] = row.strength
    assert strengths[2] > strengths[8]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_the_mean_output_of_the_fitted_half_stays(method: Any) -> None:
    layer, data = heavy_layer().double(), samples()
    fit = torch.cat(data[:2]).double()
    before = layer(fit).mean(0)
    inputs = gathered(layer, [each.double() for each in data])
    inputs.noise += 1.0
    calibrate_layer("layer", layer, inputs, W4, method)
    torch.testing.assert_close(layer(fit).mean(0), before, rtol=0, atol=1e-9)


def test_noise_of_quantized_inputs_counts_and_asks_for_smaller_weights() -> None:
    quiet, noisy, data = heavy_layer(), heavy_layer(), samples()
    quantizer = build_quantizer(MinMaxSpec(bits=2), "activation", name="layer.input_quantizer")
    without, with_noise = (
        calibrate(quiet, data, FrobeniusRecipe()),
        calibrate(noisy, data, FrobeniusRecipe(), quantizer),
    )
    assert with_noise.strength > without.strength and with_noise.std[1] < without.std[1]
    assert with_noise.quantized_error[0] > without.quantized_error[0]


@torch.no_grad()
def test_the_error_with_quantized_inputs_is_that_of_the_quantized_layer() -> None:
    """The noise is taken as uncorrelated: at 6 bits it is, within a few percent."""
    layer, data = nn.Linear(16, 8), samples()
    held_out, quantizer = torch.cat(data[2:]), build_quantizer(MinMaxSpec(bits=6), "activation", name="x")
    before, weight = layer(held_out), layer.weight
    row = calibrate(layer, data, FrobeniusRecipe(), quantizer)
    step = weight.abs().amax(1, keepdim=True) / 7
    after = quantizer(held_out) @ ((weight / step).round().clamp(-7, 7) * step).T + layer.bias
    true = (after - before).square().sum(1).mean() / (before - before.mean(0)).square().sum(1).mean()
    np.testing.assert_allclose(row.quantized_error[1], float(true), rtol=0.05)


def test_acnr_is_held_back_by_the_noise_of_the_inputs() -> None:
    layer = heavy_layer()
    inputs, weight = gathered(layer, samples()), layer.weight.detach().double()
    inputs.noise += torch.linspace(0, 10, 16)
    row = calibrate_layer("layer", layer, inputs, W4, ACNRRecipe(steps=(50,)))
    (expected,) = acnr(weight, inputs.noise, (50,))
    step = expected.abs().amax(1, keepdim=True) / 7
    quantized = (expected / step).round().clamp(-7, 7) * step
    moments, shift = inputs.held_out, (weight - expected) @ inputs.fit.mean
    error = output_error(weight - quantized, shift, moments) + float(quantized.square().sum(0) @ inputs.noise)
    assert row.errors[50] == pytest.approx(error / output_energy(weight, moments, True), rel=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_constant_inputs_change_no_output(method: Any) -> None:
    layer, x = heavy_layer(), torch.full((50, 16), 0.7)
    before = layer(x)
    row = calibrate(layer, [x, x], method)
    assert row.rank == 0 and np.isfinite(list(row.errors.values())).all()
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


def calibrate_named(data: dict[str, list[Tensor]]) -> list[CalibratedLayer]:
    layers = {name: heavy_layer() for name in data}
    inputs = {name: gathered(layers[name], each) for name, each in data.items()}
    return list(calibrate_layers(layers, inputs, quantize(), FrobeniusRecipe()))


def test_singular_gram_matrices_are_said_by_layer_but_for_one_direction(caplog: pytest.LogCaptureFixture) -> None:
    constant, norm = [torch.full((50, 16), 0.7)] * 2, nn.LayerNorm(16)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "qsam2"):
        rows = calibrate_named(
            {"few": samples(rows=4), "good": samples(), "constant": constant, "norm": [norm(x) for x in samples()]}
        )
    assert [row.rank for row in rows] == [7, 16, 0, 15]
    assert caplog.messages == [
        "the inputs of 2 layers vary in few directions on the calibration data (few 7 of 16, constant 0 of 16): "
        "more clips may help"
    ]


def test_weights_that_are_not_finite_name_the_layer() -> None:
    layer = heavy_layer()
    inputs = gathered(layer, samples())
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="^weight of layer contains NaN or infinity: check the checkpoint$"):
        calibrate_layer("layer", layer, inputs, W4, FrobeniusRecipe())


def test_a_row_is_figures_that_json_can_hold() -> None:
    row = calibrate(heavy_layer(), samples(), FrobeniusRecipe())
    figures = json.loads(json.dumps(row.figures(), allow_nan=False))
    assert figures["bits"] == 4 and "name" not in figures


# Which layers


def quantize(**changes: Any) -> QuantizeRecipe:
    spec = {"method": "minmax", "bits": 4}
    return QuantizeRecipe.model_validate({"weights": spec, "activations": spec, **changes})


@pytest.fixture(scope="module")
def sam2() -> nn.Module:
    return build_sam2("nano", image_size=64)


def test_the_linear_layers_of_the_image_encoder_by_default(sam2: nn.Module) -> None:
    found = choose_layers(sam2, quantize(), FrobeniusRecipe().layers)
    linear = {
        name for name, layer in sam2.image_encoder.named_modules(prefix="image_encoder") if type(layer) is nn.Linear
    }
    assert found.keys() == linear and len(linear) == 39


def test_others_by_pattern_but_not_what_stays_in_float(sam2: nn.Module) -> None:
    patterns = ("memory_attention.layers.0.linear?", "obj_ptr_proj.*", "*.blocks.0.mlp.layers.1")
    rules = [{"match": "obj_ptr_proj.layers.1", "keep_float": True}]
    found = choose_layers(sam2, quantize(rules=rules), patterns)
    assert list(found) == [
        "image_encoder.trunk.blocks.0.mlp.layers.1",
        "memory_attention.layers.0.linear1",
        "memory_attention.layers.0.linear2",
        "obj_ptr_proj.layers.0",
        "obj_ptr_proj.layers.2",
    ]
    assert [quantize().plan(name).weights.bits for name in list(found)[-2:]] == [4, 8]


def test_a_pattern_without_a_match_gives_the_nearest_names(sam2: nn.Module) -> None:
    message = (
        r"^calibrate.weights.layers: 'obj_ptr.layers.\*' matches no linear layer; nearest names: obj_ptr_proj.layers"
    )
    with pytest.raises(UserError, match=message):
        choose_layers(sam2, quantize(), ("image_encoder.*", "obj_ptr.layers.*"))
    with pytest.raises(UserError, match="'image_encoder.neck.*' matches no linear layer"):  # convolutions
        choose_layers(sam2, quantize(), ("image_encoder.neck.*",))


def test_a_pattern_of_float_layers_is_refused(sam2: nn.Module) -> None:
    rules = [{"match": "image_encoder.*", "keep_float": True}]
    with pytest.raises(
        UserError, match=r"'image_encoder.\*' matches only layers whose weights the recipe keeps in flo"
    ):
        choose_layers(sam2, quantize(rules=rules), ("image_encoder.*",))


def test_inputs_are_quantized_as_the_recipe_does() -> None:
    rules = [{"match": "b", "activation_bits": 8}, {"match": "c", "keep_float": True}]
    found = input_quantizers(["a", "b", "c"], quantize(rules=rules))
    assert {name: quantizer.bits for name, quantizer in found.items()} == {"a": 4, "b": 8}
    assert input_quantizers(["a"], quantize(activations=None)) == {}


def test_layers_are_calibrated_in_place_and_their_statistics_given_back() -> None:
    model = nn.Sequential(heavy_layer(), nn.ReLU(), nn.Linear(8, 3))
    layers = choose_layers(model, quantize(), ("0", "2"))
    inputs = gather_inputs(layers, model, samples(), 4, input_quantizers(list(layers), quantize()))
    before = model[0].weight.clone()
    rows = list(calibrate_layers(layers, inputs, quantize(), FrobeniusRecipe()))
    assert [(row.name, row.bits) for row in rows] == [("0", 4), ("2", 4)] and not inputs
    assert not torch.equal(model[0].weight, before)
