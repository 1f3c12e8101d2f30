"""GPTQ rounding: the algorithm against a plain one, every grid, what is frozen, and whole models through the audit."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_calibration import calibration_data, quantize, relative_error
from torch import Tensor, nn

from qsam2.calibration import gptq as module
from qsam2.calibration.activation_ranges import find_ranges, find_sam2_ranges
from qsam2.calibration.gptq import RoundedLayer, gptq, round_layer, round_sam2, rounded_layers
from qsam2.calibration.gram import gather_inputs
from qsam2.errors import UserError
from qsam2.formats.packed import load_packed, save_packed
from qsam2.layers.audit import audit
from qsam2.layers.convert import convert, finalize, quantized_weights
from qsam2.models import build_sam2
from qsam2.quantizers import QuantizerState
from qsam2.quantizers.passes import to_levels
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import methods

ToGrid = Callable[[Tensor], Tensor]
WEIGHT_METHODS = sorted(name for name, spec in methods().items() if "weight" in spec.roles)


def grid(rows: int, bits: int = 3, mid_rise: bool = False, scale: float = 0.5) -> tuple[Tensor, ToGrid]:
    """Scales of the rows, and the nearest values on their grids."""
    scales = scale * torch.linspace(1, 2, rows, dtype=torch.float64)[:, None]
    offset = 0.5 if mid_rise else 0.0
    low, high = (torch.full_like(scales, level + offset) for level in (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return scales, lambda weight: to_levels(weight, scales, low, high, mid_rise) * scales


def correlated(rows: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(size) + 0.5 * torch.randn(size, size, generator=generator)
    return torch.randn(rows, size, generator=generator) @ mix + 1


def plain_gptq(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, low: float, high: float) -> np.ndarray:
    """Optimal brain surgery, a column at a time: no Cholesky factor, no blocks. Mid-tread grids."""
    inverse, left = np.linalg.inv(hessian), list(range(len(hessian)))
    weight, result = weight.copy(), np.zeros_like(weight)
    for column in sorted(left, key=lambda j: -hessian[j, j]):
        result[:, column] = np.clip(np.round(weight[:, column] / scale), low, high) * scale
        error = (weight[:, column] - result[:, column]) / inverse[column, column]
        weight -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # gone; only what is left counts
    return result


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_plain_algorithm(block: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    x, (scales, to_grid) = correlated(200, 20, seed).double(), grid(6)
    gram = x.T @ x / len(x)
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed)).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(20)
    expected = plain_gptq(weight.numpy(), damped.numpy(), scales[:, 0].numpy(), -4, 3)
    before = weight.clone()
    np.testing.assert_allclose(gptq(weight, gram, to_grid, 0.01).numpy(), expected, atol=1e-9)
    assert torch.equal(weight, before)


@given(st.integers(1, 8), st.integers(1, 24), st.integers(2, 8), st.booleans(), st.integers(0, 999))
@settings(max_examples=20)
def test_values_are_on_the_grid_and_the_nearest_without_correlation(
    rows: int, size: int, bits: int, mid_rise: bool, seed: int
) -> None:
    x, (_, to_grid) = correlated(30, size, seed).double(), grid(rows, bits, mid_rise)
    weight = 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double()
    found = gptq(weight, x.T @ x, to_grid, 0.01)
    assert torch.equal(to_grid(found), found)
    for gram in (torch.diag(torch.rand(size).double() + 0.1), torch.zeros(size, size).double()):
        assert torch.equal(gptq(weight, gram, to_grid, 0.01), to_grid(weight)), "uncorrelated and absent inputs"


def test_with_noise_the_best_weights_for_noisy_inputs_are_rounded() -> None:
    """On a fine grid what is rounded shows: the least squares solution for inputs with added noise."""
    x, (_, to_grid) = correlated(4000, 6).double(), grid(3, bits=24, scale=1e-5)
    noise = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    weight, moment = torch.randn(3, 6, dtype=torch.float64), x.T @ x / len(x)
    expected = np.linalg.solve((moment + torch.diag(noise)).numpy(), (weight @ moment).T.numpy()).T
    np.testing.assert_allclose(gptq(weight, moment, to_grid, 1e-12, noise).numpy(), expected, atol=1e-3)
    assert np.abs(expected - weight.numpy()).max() > 0.05


# Layers


def layer(activations: dict[str, Any] | None = None, bias: bool = True, **weights: Any) -> nn.Sequential:
    """A calibrated linear layer, under the name 0, with `mse` weights unless `weights` say otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=bias))
    convert(model, QuantizeRecipe.model_validate({"weights": {"method": "mse", **weights}, "activations": activations}))
    find_ranges(model, model, batches())
    return model.eval()


def batches(count: int = 4) -> list[Tensor]:
    return list(correlated(200 * count, 16).split(200))


def rounded(model: nn.Module, data: list[Tensor], damping: float = 0.01) -> RoundedLayer:
    """Round the one layer of a model that GPTQ rounds."""
    ((name, layer),) = rounded_layers(model).items()
    return round_layer(name, layer, gather_inputs({name: layer}, model, data, len(data))[name], damping)


@pytest.mark.parametrize(("bias", "input_bits", "tolerance"), [(True, None, 1e-3), (False, None, 1e-3), (True, 5, 0.1)])
@torch.no_grad()
def test_errors_are_those_of_the_layer_on_held_out_data_and_smaller(bias: bool, input_bits: Any, tolerance: float):
    """The noise of quantized inputs is taken as uncorrelated: at 5 bits it is, within a few percent."""
    model = layer({"method": "minmax", "bits": input_bits} if input_bits else None, bias, bits=3)
    x = torch.cat(batches()[2:])
    outputs, nearest = nn.functional.linear(x, model[0].weight, model[0].bias), model(x)
    row = rounded(model, batches())
    assert row.error[0] == pytest.approx(relative_error(nearest, outputs, centred=bias), rel=tolerance)
    assert row.error[1] == pytest.approx(relative_error(model(x), outputs, centred=bias), rel=tolerance)
    assert row.error[1] < 0.8 * row.error[0]
    assert model[0].weight_quantizer.state is QuantizerState.FROZEN
    if bias and not input_bits:  # it takes up the mean on the fitted half
        fitted, fresh = torch.cat(batches()[:2]), layer(bits=3)
        before = nn.functional.linear(fitted, fresh[0].weight, fresh[0].bias).mean(0)
        assert (fresh(fitted).mean(0) - before).abs().max() > 0.01
        torch.testing.assert_close(model(fitted).mean(0), before, rtol=0, atol=1e-5)


def test_noise_is_that_of_the_layers_own_quantizer() -> None:
    model, data = layer({"method": "minmax", "bits": 3}, bits=4), batches(2)
    found = gather_inputs({"0": model[0]}, model, data, 2)["0"]
    x, quantizer = torch.cat(data), model[0].input_quantizer
    np.testing.assert_allclose(found.noise.numpy(), (quantizer(x) - x).square().mean(0).numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.fit.mean.numpy(), data[0].double().mean(0).numpy(), rtol=1e-6)
    assert quantizer.state is QuantizerState.QUANTIZE


def test_the_nearest_stay_where_they_do_better_on_held_out_data() -> None:
    model = layer(bits=4)
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    along = torch.outer(torch.randn(100), torch.randn(16))
    row = rounded(model, [along, 100 * torch.randn(100, 16)])  # fitted along one direction alone
    assert row.error[0] == row.error[1]
    quantizer = model[0].weight_quantizer
    assert torch.equal(model[0].weight, quantizer(weight)) and torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_integers_of_every_method_survive_finalizing(method: str, bits: int, granularity: str) -> None:
    model = layer(method=method, bits=bits, granularity=granularity)
    row = rounded(model, batches())
    assert row.bits == bits and row.error[1] <= row.error[0]
    linear, quantizer = model[0], model[0].weight_quantizer
    weight, codes = linear.weight.clone(), quantizer.to_int(linear.weight)
    assert torch.equal(quantizer.dequantize(codes), weight) and torch.equal(linear.quantized_weight(), weight)
    finalize(model)
    assert torch.equal(linear.weight, weight) and torch.equal(quantizer.to_int(linear.weight), codes)
    assert len(codes.unique()) <= 2**bits


def test_affine_weights_and_the_statistics_of_the_last_weight() -> None:
    """A running quantizer updates its statistics from the weight once more before it is frozen."""
    model = layer(method="minmax", bits=3, symmetric=False)
    with torch.no_grad():
        model[0].weight.mul_(2)
    spread = model[0].weight.amax(1) - model[0].weight.amin(1)
    row = rounded(model, batches())
    codes = model[0].weight_quantizer.to_int(model[0].weight)
    assert codes.min() >= 0 and codes.max() <= 7 and row.error[1] < row.error[0]
    torch.testing.assert_close(model[0].weight_quantizer.scale, spread / 7)


def test_layers_with_quantized_weights_and_without_groups_are_rounded() -> None:
    layers = {
        "plain": nn.Conv2d(3, 8, 3, stride=2, padding=1),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "transposed": nn.ConvTranspose2d(8, 4, 2, stride=2),
        "kept": nn.Conv2d(4, 4, 1),
    }
    model, images = nn.Sequential(OrderedDict(layers)), nn.functional.avg_pool2d(torch.randn(4, 3, 24, 24), 3, 1)
    convert(model, quantize(3, activations=None, rules=[{"match": "kept", "keep_float": True}]))
    find_ranges(model, model, [])
    assert list(rounded_layers(model)) == ["plain"]
    plain, others = model.plain, [model.depthwise.weight.clone(), model.transposed.weight.clone()]

    def rows(outputs: Tensor) -> Tensor:
        return outputs.detach().transpose(0, 1).flatten(1).T

    expected = rows(plain._conv_forward(images[2:], plain.weight, plain.bias))
    row = rounded(model, list(images.split(1)))
    assert row.inputs == 27 and row.error[1] < row.error[0]
    assert row.error[1] == pytest.approx(relative_error(rows(plain(images[2:])), expected), rel=1e-3)
    assert torch.equal(model.depthwise.weight, others[0]) and torch.equal(model.transposed.weight, others[1])


def test_a_damping_that_leaves_the_gram_matrix_singular() -> None:
    message = r"^calibrate.rounding.damping=1e-300: the Gram matrix of 0 is singular with it, raise it"
    with pytest.raises(UserError, match=message):
        rounded(layer(bias=False, bits=4), [torch.ones(20, 16)] * 2, damping=1e-300)


@pytest.mark.parametrize("bias", [True, False])
def test_constant_inputs_are_no_trouble(bias: bool) -> None:
    row = rounded(layer(bias=bias, bits=2), [torch.full((50, 16), 0.7)] * 2)
    assert np.isfinite(row.error).all() and row.error[1] <= row.error[0]
    assert json.loads(json.dumps(vars(row), allow_nan=False)).keys() == {"bits", "inputs", "error"}


@pytest.mark.slow
def test_integers_of_a_whole_model_survive_audit_and_packing(tmp_path: Path) -> None:
    def codes(model: nn.Module) -> dict[str, Tensor]:
        return {name: quantizer.to_int(each.weight) for name, each, quantizer in quantized_weights(model)}

    recipe = quantize(3, activations={"method": "minmax", "bits": 8})
    model, data = build_sam2("nano", image_size=64), calibration_data()
    conversion = convert(model, recipe)
    find_sam2_ranges(model, data, progress=False)
    nearest = codes(copy.deepcopy(model))
    rows = round_sam2(model, data, 0.01, progress=False)
    assert rows.keys() == rounded_layers(model).keys() and len(rows) > 100
    mean = np.log([[error + 1e-12 for error in row.error] for row in rows.values()]).mean(0)
    assert mean[1] < mean[0] - 0.3
    before = codes(model)
    assert sum(not torch.equal(before[name], nearest[name]) for name in rows) > 100
    others = nearest.keys() - rows.keys()
    assert others and all(torch.equal(before[name], nearest[name]) for name in others)

    finalize(model)
    audit(model, conversion, recipe, lambda: model.forward_image(torch.ones(1, 3, 64, 64)))
    save_packed(tmp_path / "model.safetensors", model, {"quantize": recipe.model_dump(mode="json")})
    fresh = build_sam2("nano", image_size=64)
    load_packed(tmp_path / "model.safetensors", fresh)
    for found in (codes(model), codes(fresh)):
        assert all(torch.equal(found[name], before[name]) for name in before)
