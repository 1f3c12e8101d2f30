"""New weights: ridge and ACNR against dense solves, the choice on held-out data, which layers, and every message."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_calibration import on_grid, quantize, relative_error
from torch import Tensor, nn

from qsam2.calibration.gram import LayerInputs, Moments, gather_inputs, observe_inputs
from qsam2.calibration.weights import (
    CalibratedLayer,
    Spectrum,
    acnr,
    calibrate_layer,
    calibrate_layers,
    choose_layers,
    output_energy,
    output_error,
    ridge,
)
from qsam2.errors import UserError
from qsam2.models import build_sam2
from qsam2.recipe.calibrate import ACNRRecipe, FrobeniusRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec

W4 = MinMaxSpec(bits=4)
METHODS = (FrobeniusRecipe(), ACNRRecipe())
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
RHOS = (0.0, 1e-6, 1e-3, 0.1, 1.0, 100.0)


def inputs(count: int = 200, size: int = 12, seed: int = 0) -> Tensor:
    """Correlated, of very different energies, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(-2, 1, size)
    return torch.randn(count, size, generator=generator) @ mix + 3


def moments_of(x: Tensor, weight: Tensor | None = None) -> Moments:
    moments = Moments(x.shape[1], weight=weight)
    moments.add(x)
    return moments


def spectrum_of(x: Tensor, centred: bool = True) -> Spectrum:
    return Spectrum(moments_of(x), centred=centred)


def ridges(x: Tensor, weight: Tensor, rhos: Sequence[float], centred: bool = True, read: Tensor | None = None):
    """Weights for outputs of x from the rows that are read for it, x itself by default."""
    moments = Moments(x.shape[1])
    moments.add(x, read)
    return ridge(weight, Spectrum(moments, centred=centred), rhos, moments.cross_moment(centred=centred))


def weights(rows: int = 7, columns: int = 12) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(x: Tensor, weight: Tensor, rho: float, centred: bool, read: Tensor | None = None) -> np.ndarray:
    """The least squares problem itself: rows of what is read, and sqrt(lambda) I below them."""
    data, q = (each.double().numpy() for each in (x, x if read is None else read))
    data, q = (each - each.mean(0) if centred else each for each in (data, q))
    strength = rho * len(q) * (q**2).mean()
    stacked = np.vstack([q, np.sqrt(strength) * np.eye(q.shape[1])])
    target = np.vstack([data @ weight.numpy().T, np.zeros((q.shape[1], len(weight)))])
    return np.linalg.lstsq(stacked, target, rcond=None)[0].T


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rho", RHOS[1:])
def test_ridge_is_the_dense_solution(rho: float, centred: bool) -> None:
    x, weight = inputs(), weights()
    none, least, found = ridges(x, weight, [0.0, 1e-13, rho], centred)
    assert torch.equal(none, weight), "bit for bit, and nearly so at full rank in the limit"
    torch.testing.assert_close(least, weight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.numpy(), dense(x, weight, rho, centred), rtol=1e-8, atol=1e-8)
    coarse = x.div(4).round() * 4  # an error that is correlated with x
    (found,) = ridges(x, weight, [rho], centred, coarse)
    np.testing.assert_allclose(found.numpy(), dense(x, weight, rho, centred, coarse), rtol=1e-8, atol=1e-8)


def test_what_the_inputs_never_show_is_dropped() -> None:
    x = inputs()
    x[:, 4] = x[:, 7]  # W acts on their sum only
    x[:, 2] = 5.0  # the bias takes it up
    spectrum, weight = spectrum_of(x), weights()
    assert spectrum.rank == 10 and 1 < spectrum.condition_number < 1e10
    (found,) = ridges(x, weight, [1e-9])
    half = (weight[:, 4] + weight[:, 7]) / 2
    for column, expected in ((4, half), (7, half), (2, 0 * half)):
        torch.testing.assert_close(found[:, column], expected, rtol=0, atol=1e-3)
    few = inputs(count=5)
    assert spectrum_of(few).rank == 4 and all(found.isfinite().all() for found in ridges(few, weight, RHOS))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6, -3.7e-5])
def test_constant_inputs_have_rank_zero_and_keep_the_weights(value: float) -> None:
    x = torch.full((1000, 12), value)
    assert (spectrum_of(x).rank, spectrum_of(x).condition_number) == (0, 1.0)
    assert all(torch.equal(found, weights()) for found in ridges(x, weights(), RHOS))


def reference_acnr(weight: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """One SVD a step, one singular value at a time."""
    for _ in range(steps):
        left, sigma, right = np.linalg.svd(weight, full_matrices=False)
        mean, share, raised = sigma.mean(), 0.0, []
        for index, value in enumerate(sigma):
            pulled = (value + 2 * 0.003 * mean) / (1 + 2 * 0.003 + 2 * 0.001 * (right[index] ** 2 @ noise))
            raised.append(value if share <= 0.8 * (sigma**2).sum() else max(value, pulled))
            share += value**2
        weight = left @ np.diag(raised) @ right
    return weight


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("noisy", [0.0, 30.0])
def test_acnr_takes_the_steps_of_the_reference(shape: tuple[int, int], noisy: float) -> None:
    weight = weights(*shape) @ torch.logspace(0, -3, shape[1], dtype=torch.float64).diag()
    noise = noisy * torch.linspace(0, 1, shape[1], dtype=torch.float64)
    none, one, many = acnr(weight, noise, (0, 1, 25))
    assert torch.equal(none, weight)
    for found, steps in ((one, 1), (many, 25)):
        np.testing.assert_allclose(found.numpy(), reference_acnr(weight.numpy(), noise.numpy(), steps), atol=1e-10)
    before, after = (torch.linalg.svdvals(each) for each in (weight, many))
    torch.testing.assert_close(after[0], before[0])
    assert after[-1] > 2 * before[-1] and after[0] / after[-1] < before[0] / before[-1]
    assert not acnr(torch.zeros_like(weight), noise, (5,))[0].any()


# Layers


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


def gathered(layer: nn.Linear, data: list[Tensor], input_bits: int | None = None) -> LayerInputs:
    layers = {"layer": layer}
    quantizers = observe_inputs(layers, layer, data, len(data), quantize(input_bits)) if input_bits else None
    return gather_inputs(layers, layer, data, len(data), quantizers)["layer"]


def calibrate(
    layer: nn.Linear, data: list[Tensor], method: Any = METHODS[0], input_bits: int | None = None, bits: int = 4
) -> CalibratedLayer:
    return calibrate_layer("layer", layer, gathered(layer, data, input_bits), MinMaxSpec(bits=bits), method)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_errors_are_those_of_the_quantized_layer_on_held_out_data(bias: bool) -> None:
    layer, data = heavy_layer(bias=bias), samples(2) * 2  # what is fitted in the end is that of each half
    x = torch.cat(data)
    original = layer(x)

    def error(weight: Tensor) -> float:
        """With the bias that keeps the mean output."""
        shift = (original - x @ weight.T).mean(0) if bias else 0
        return relative_error(x @ weight.T + shift, original, centred=bias)

    expected = [error(on_grid(layer))]
    row = calibrate(layer, data)
    expected += [error(on_grid(layer)), error(layer.weight)]
    assert row.strength > 0 and row.std[1] < row.std[0]
    np.testing.assert_allclose(row.quantized_error, expected[:2], rtol=1e-3)
    np.testing.assert_allclose(row.float_error, expected[2], rtol=1e-2, atol=1e-9)
    assert row.quantized_error[1] < row.quantized_error[0] / (20 if bias else 2)
    figures = json.loads(json.dumps(vars(row), allow_nan=False))
    assert figures["bits"] == 4


@each_method
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_none_on_held_out_data(method: Any, seed: int) -> None:
    torch.manual_seed(seed)
    row = calibrate(nn.Linear(16, 8), samples(seed=seed), method)
    assert row.errors[0] == row.quantized_error[0] and min(row.errors.values()) == row.quantized_error[1]
    assert row.errors.keys() == set(method.strengths) and row.strength in row.errors


def test_the_choice_is_made_at_the_bits_of_the_recipe_and_weights_that_gain_nothing_stay() -> None:
    assert calibrate(heavy_layer(), samples(), bits=4).strength > calibrate(heavy_layer(), samples(), bits=8).strength
    method = FrobeniusRecipe(rhos=(100.0,))
    assert method.strengths == (0, 100.0) and ACNRRecipe(steps=(7, 2)).strengths == (0, 2, 7)
    layer = nn.Linear(16, 8)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    row = calibrate(layer, samples(), method)
    assert row.strength == 0 and row.float_error == 0
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


@each_method
def test_the_mean_output_stays_and_that_of_constant_inputs(method: Any) -> None:
    layer, data = heavy_layer().double(), [each.double() for each in samples()]
    before = layer(torch.cat(data)).mean(0)
    found = gathered(layer, data)
    for half in (found.fit, found.held_out):
        half.noise += 1.0
    calibrate_layer("layer", layer, found, W4, method)
    torch.testing.assert_close(layer(torch.cat(data)).mean(0), before, rtol=0, atol=1e-9)

    layer, x = heavy_layer(), torch.full((50, 16), 0.7)
    before = layer(x)
    row = calibrate(layer, [x, x], method)
    assert row.rank == 0 and np.isfinite(list(row.errors.values())).all()
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [2, 6])
@torch.no_grad()
def test_the_error_with_quantized_inputs_is_that_of_the_quantized_layer(bits: int, bias: bool) -> None:
    layer, data = nn.Linear(16, 8, bias=bias), samples(2) * 2  # what is fitted in the end is that of each half
    x, found = torch.cat(data), gathered(layer, data, bits)
    before = layer(x)
    row = calibrate_layer("layer", layer, found, W4, FrobeniusRecipe())
    outputs = nn.functional.linear(found.quantizer(x), on_grid(layer), layer.bias)
    shift = (before - outputs).mean(0) if bias else 0  # of the bias that the rounded weights will get
    np.testing.assert_allclose(row.quantized_error[1], relative_error(outputs + shift, before, centred=bias), rtol=1e-4)
    in_float = nn.functional.linear(found.quantizer(x), layer.weight, layer.bias)
    np.testing.assert_allclose(row.float_error, relative_error(in_float, before, centred=bias), rtol=1e-4)


@torch.no_grad()
def test_the_best_strength_is_fitted_again_on_all_samples() -> None:
    layer, data, weight = heavy_layer(), samples(), heavy_layer().weight.detach().double()
    row = calibrate(layer, data)
    expected = ridges(torch.cat(data), weight, [row.strength])[0]
    np.testing.assert_allclose(layer.weight.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    half = ridges(torch.cat(data[:2]), weight, [row.strength])[0]
    assert row.strength > 0 and (half - expected).abs().max() > 1e-3


def test_noise_of_the_inputs_asks_for_smaller_weights() -> None:
    without, noisy = (calibrate(heavy_layer(), samples(), input_bits=bits) for bits in (None, 2))
    assert noisy.strength > without.strength and noisy.std[1] < without.std[1]
    assert noisy.quantized_error[0] > without.quantized_error[0]


def test_acnr_is_held_back_by_the_noise_of_the_inputs() -> None:
    layer = heavy_layer()
    found, weight = gathered(layer, samples()), layer.weight.detach().double()
    found.fit.noise += torch.linspace(0, 10, 16)
    row = calibrate_layer("layer", layer, found, W4, ACNRRecipe(steps=(50,)))
    (expected,) = acnr(weight, found.fit.noise, (50,))
    twin = nn.Linear(16, 8)
    twin.weight = nn.Parameter(expected)
    quantized = on_grid(twin).detach()
    moments, shift = found.held_out, (weight - quantized) @ found.fit.mean
    error = output_error(weight, quantized, shift, moments)
    assert row.errors[50] == pytest.approx(error / output_energy(weight, moments, True), rel=1e-4)


def test_layers_are_calibrated_in_place_and_singular_gram_matrices_are_named_but_for_one_direction(
    caplog: pytest.LogCaptureFixture,
) -> None:
    constant, norm = [torch.full((50, 16), 0.7)] * 2, nn.LayerNorm(16)
    norms = [norm(x).detach() for x in samples()]
    data = {"few": samples(rows=4), "good": samples(), "constant": constant, "norm": norms}
    layers = {name: heavy_layer() for name in data}
    found = {name: gathered(layers[name], each) for name, each in data.items()}
    with caplog.at_level(logging.WARNING, "qsam2"):
        rows = calibrate_layers(layers, found, quantize(), FrobeniusRecipe(), progress=False)
    assert {name: row.rank for name, row in rows.items()} == {"few": 7, "good": 16, "constant": 0, "norm": 15}
    assert not found and not torch.equal(layers["good"].weight, heavy_layer().weight)
    assert caplog.messages == [
        "the inputs of 2 layers vary in few directions on the calibration data (few 7 of 16, constant 0 of 16): "
        "more clips may help"
    ]


def test_weights_that_are_not_finite_name_the_layer() -> None:
    layer = heavy_layer()
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    found = gathered(layer, samples())
    with pytest.raises(UserError, match="^weight of layer contains NaN or infinity: check the checkpoint$"):
        calibrate_layer("layer", layer, found, W4, FrobeniusRecipe())


# Which layers


@pytest.fixture(scope="module")
def sam2() -> nn.Module:
    return build_sam2("nano", image_size=64)


def test_the_linear_layers_of_the_image_encoder_or_others_by_pattern_but_none_that_stays_in_float(sam2) -> None:
    found = choose_layers(sam2, quantize(), FrobeniusRecipe().layers)
    modules = sam2.image_encoder.named_modules(prefix="image_encoder")
    assert found.keys() == {name for name, layer in modules if type(layer) is nn.Linear} and len(found) == 39
    patterns = ("memory_attention.layers.0.linear?", "obj_ptr_proj.*", "*.blocks.0.mlp.layers.1")
    found = choose_layers(sam2, quantize(rules=[{"match": "obj_ptr_proj.layers.1", "keep_float": True}]), patterns)
    assert list(found) == [
        "image_encoder.trunk.blocks.0.mlp.layers.1",
        *(f"memory_attention.layers.0.linear{part}" for part in (1, 2)),
        *(f"obj_ptr_proj.layers.{index}" for index in (0, 2)),
    ]
    assert [quantize().plan(name).weights.bits for name in list(found)[-2:]] == [4, 8]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "obj_ptr.layers.*",
            r"^calibrate.weights.layers: 'obj_ptr.layers.\*' matches no linear layer; nearest names: obj",
        ),
        ("image_encoder.neck.*", "'image_encoder.neck.*' matches no linear layer"),  # convolutions
        (
            "memory_encoder.*",
            r"'memory_encoder.\*' matches only layers whose weights the recipe keeps in float: remove",
        ),
    ],
)
def test_a_pattern_without_a_quantized_layer_is_refused(sam2: nn.Module, pattern: str, message: str) -> None:
    rules = [{"match": "memory_encoder.*", "keep_float": True}]
    with pytest.raises(UserError, match=message):
        choose_layers(sam2, quantize(rules=rules), ("image_encoder.*", pattern))
