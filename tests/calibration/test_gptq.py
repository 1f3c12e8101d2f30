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
from qsam2.calibration.gptq import FloatLayer, RoundedLayer, float_layers, gptq, round_layer, round_sam2, rounded_layers
from qsam2.calibration.gram import gather_inputs
from qsam2.errors import UserError
from qsam2.formats.packed import load_packed, save_packed
from qsam2.layers.audit import audit
from qsam2.layers.convert import convert, finalize, quantized_weights
from qsam2.layers.weight import QuantizedLayer
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
    several = gptq(weight, gram, to_grid, [1.0, 0.01])
    np.testing.assert_allclose(several[1].numpy(), expected, atol=1e-9)
    assert torch.equal(gptq(weight, gram, to_grid, [1.0])[0], several[0]) and not torch.equal(*several)
    assert torch.equal(weight, before)
    monkeypatch.setattr(module, "BATCH_BYTES", 2 * gram.nbytes)  # of a layer that is too large for all at a time
    parts = gptq(weight, gram, to_grid, [1.0, 0.01, 0.1])
    assert len(parts) == 3 and all(torch.equal(*pair) for pair in zip(parts, several, strict=False))


@given(st.integers(1, 8), st.integers(1, 24), st.integers(2, 8), st.booleans(), st.integers(0, 999))
@settings(max_examples=20)
def test_values_are_on_the_grid_and_the_nearest_without_correlation(
    rows: int, size: int, bits: int, mid_rise: bool, seed: int
) -> None:
    x, (_, to_grid) = correlated(30, size, seed).double(), grid(rows, bits, mid_rise)
    weight = 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double()
    (found,) = gptq(weight, x.T @ x, to_grid, [0.01])
    assert torch.equal(to_grid(found), found)
    for gram in (torch.diag(torch.rand(size).double() + 0.1), torch.zeros(size, size).double()):
        assert torch.equal(gptq(weight, gram, to_grid, [0.01])[0], to_grid(weight)), "uncorrelated and absent inputs"


@pytest.mark.parametrize("damping", [1e-9, 0.3])
def test_what_is_rounded_is_best_for_what_the_layer_reads(damping: float) -> None:
    """On a fine grid what is rounded shows: the least squares solution for the wanted outputs, pulled to the weight."""
    x, (_, to_grid) = correlated(4000, 6).double(), grid(3, bits=24, scale=1e-5)
    q = x.div(3).round() * 3
    weight, wanted = torch.randn(2, 3, 6, dtype=torch.float64)
    moment = q.T @ q / len(q)
    pull = damping * moment.diagonal().mean()
    left, right = moment + pull * torch.eye(6), wanted @ (x.T @ q / len(q)) + pull * weight
    expected = np.linalg.solve(left.numpy(), right.T.numpy()).T
    (found,) = gptq(weight, moment, to_grid, [damping], wanted @ (x.T @ q / len(q)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
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


def rounded(model: nn.Module, data: list[Tensor], *dampings: float, trains: bool = False) -> RoundedLayer:
    """Round the one layer of a model that is rounded; with a damping of 0.01 unless others are given."""
    ((name, layer),) = rounded_layers(model).items()
    inputs = gather_inputs({name: layer}, model, data, len(data))[name]
    return round_layer(name, layer, inputs, target(layer), dampings or (0.01,), trains=trains)


def target(layer: QuantizedLayer) -> FloatLayer:
    bias = layer._parameters["bias"]
    return FloatLayer(layer.weight.detach().clone(), None if bias is None else bias.detach().clone())


@pytest.mark.parametrize(("bias", "input_bits"), [(True, None), (False, None), (True, 5), (True, 2), (False, 3)])
@torch.no_grad()
def test_errors_are_those_of_the_layer_on_held_out_data_and_smaller(bias: bool, input_bits: int | None) -> None:
    model = layer({"method": "minmax", "bits": input_bits} if input_bits else None, bias, bits=3)
    data = batches(2) * 2  # what is fitted in the end is that of each half
    x = torch.cat(data)
    outputs, nearest = nn.functional.linear(x, model[0].weight, model[0].bias), model(x)
    row = rounded(model, data)
    assert row.error[0] == pytest.approx(relative_error(nearest, outputs, centred=bias), rel=1e-3)
    assert row.error[1] == pytest.approx(relative_error(model(x), outputs, centred=bias), rel=1e-3)
    assert row.error[1] < 0.9 * row.error[0] and row.damping == 0.01
    assert model[0].weight_quantizer.state is QuantizerState.FROZEN
    if bias and not input_bits:  # it takes up the mean
        before = outputs.mean(0)
        assert (nearest.mean(0) - before).abs().max() > 0.01
        torch.testing.assert_close(model(x).mean(0), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_best_damping_is_fitted_again_on_all_samples() -> None:
    data, model = batches(), layer(bits=3)
    weight, linear = model[0].weight.double(), model[0]
    row = rounded(model, data, 0.03)
    x = torch.cat(data).double()
    scale = linear.weight_quantizer.scale.double()[:, None]
    moment = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    (expected,) = gptq(weight, moment, lambda w: (w / scale).round().clamp(-4, 3) * scale, (0.03,))
    assert row.damping == 0.03
    torch.testing.assert_close(linear.weight.double(), expected, rtol=0, atol=1e-6)
    before = nn.functional.linear(x.float(), weight.float(), layer(bits=3)[0].bias).mean(0)
    torch.testing.assert_close(model(x.float()).mean(0), before, rtol=0, atol=1e-4)


def test_the_nearest_stay_where_they_do_better_on_held_out_data() -> None:
    model = layer(bits=4)
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    along = torch.outer(torch.randn(100), torch.randn(16))
    row = rounded(model, [along + 9, 100 * torch.randn(100, 16)])  # fitted along one direction alone, and another mean
    assert row.error[0] == row.error[1] and row.damping == 0
    quantizer = model[0].weight_quantizer
    assert torch.equal(model[0].weight, quantizer(weight)) and torch.equal(model[0].bias, bias)


@torch.no_grad()
def test_the_nearest_get_a_bias_that_keeps_the_mean_and_the_best_damping_is_taken() -> None:
    data = [batch + 3 for batch in batches()]
    nearest, weight = layer({"method": "minmax", "bits": 2}, bits=3), layer(bits=3)[0].weight.clone()
    x = torch.cat(data)
    before = nn.functional.linear(x, weight, nearest[0].bias)
    ((name, one),) = rounded_layers(nearest).items()
    row = round_layer(name, one, gather_inputs({name: one}, nearest, data, 4)[name], target(one), ())
    assert torch.equal(one.weight, one.weight_quantizer(weight)) and row.damping == 0
    torch.testing.assert_close(nearest(x).mean(0), before.mean(0), rtol=0, atol=1e-4)
    assert row.error[1] < 0.97 * row.error[0]

    dampings = (0.001, 0.03, 1.0, 30.0)
    alone = {each: rounded(layer(bits=3), batches(), each).error[1] for each in dampings}
    best = rounded(layer(bits=3), batches(), *dampings)
    assert best.damping == min(alone, key=alone.__getitem__) and best.error[1] == pytest.approx(min(alone.values()))
    assert len(set(alone.values())) == 4


@torch.no_grad()
def test_what_is_followed_is_the_float_layer_not_the_calibrated_one() -> None:
    """Calibration has moved weight and bias; the error counts from the layer before it, and the fit makes up for it."""
    model, data = layer(bits=4), batches(2) * 2
    original = target(model[0])
    model[0].weight.mul_(0.9)
    model[0].bias.add_(1.0)
    find_ranges(model, model, data)
    x = torch.cat(data)
    expected, nearest = nn.functional.linear(x, original.weight, original.bias), model(x)
    inputs = gather_inputs({"0": model[0]}, model, data, 4, weights={"0": original.weight})["0"]
    row = round_layer("0", model[0], inputs, original, (1e-4, 0.01))
    assert row.error[0] == pytest.approx(relative_error(nearest, expected), rel=1e-3)
    assert row.error[1] == pytest.approx(relative_error(model(x), expected), rel=1e-3)
    assert row.error[1] < 0.1 * row.error[0]


@pytest.mark.parametrize("method", [name for name in WEIGHT_METHODS if name != "dorefa"])
@pytest.mark.parametrize("bits", [2, 4])
@torch.no_grad()
def test_weights_that_are_trained_on_stay_in_float_in_the_cells_of_the_integers(method: str, bits: int) -> None:
    ready, fixed = (layer(method=method, bits=bits) for _ in range(2))
    weight = ready[0].weight.clone()
    rows = [rounded(model, batches(), trains=trains) for model, trains in ((ready, True), (fixed, False))]
    assert rows[0] == rows[1] and rows[0].error[1] < rows[0].error[0]
    quantizer = ready[0].weight_quantizer
    assert quantizer.state is QuantizerState.QUANTIZE
    frozen = fixed[0].weight_quantizer  # a method that follows the weight has another scale once it has moved
    torch.testing.assert_close(frozen(ready[0].weight), fixed[0].weight, rtol=0, atol=1e-6)
    same = frozen(weight) == fixed[0].weight
    margins = (weight - fixed[0].weight).abs() <= frozen.scale[:, None] * (0.5 - module.MARGIN)
    assert torch.equal(ready[0].weight[same & margins], weight[same & margins]) and not torch.equal(same, margins)
    torch.testing.assert_close(ready[0].bias, fixed[0].bias)


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
    images = torch.cat([images[:2]] * 2)
    plain, others = model.plain, [model.depthwise.weight.clone(), model.transposed.weight.clone()]

    def rows(outputs: Tensor) -> Tensor:
        return outputs.detach().transpose(0, 1).flatten(1).T

    expected = rows(plain._conv_forward(images[2:], plain.weight, plain.bias))
    row = rounded(model, list(images.split(1)))
    assert row.inputs == 27 and row.error[1] < row.error[0]
    assert row.error[1] == pytest.approx(relative_error(rows(plain(images[2:])), expected), rel=1e-3)
    assert torch.equal(model.depthwise.weight, others[0]) and torch.equal(model.transposed.weight, others[1])


def test_a_damping_that_leaves_the_gram_matrix_singular() -> None:
    ones = [torch.ones(20, 16)] * 2
    message = r"^calibrate.rounding.damping=1e-300, 1e-200: the Gram matrix of 0 is singular with them, give larger"
    with pytest.raises(UserError, match=message):
        rounded(layer(bias=False, bits=4), ones, 1e-300, 1e-200)
    assert rounded(layer(bias=False, bits=4), ones, 1e-300, 0.1).damping in (0, 0.1), "those that can be are used"


@pytest.mark.parametrize("bias", [True, False])
def test_constant_inputs_are_no_trouble(bias: bool) -> None:
    row = rounded(layer(bias=bias, bits=2), [torch.full((50, 16), 0.7)] * 2)
    assert np.isfinite(row.error).all() and row.error[1] <= row.error[0]
    assert json.loads(json.dumps(vars(row), allow_nan=False)).keys() == {"bits", "inputs", "error", "damping"}


@pytest.mark.slow
def test_integers_of_a_whole_model_survive_audit_and_packing(tmp_path: Path) -> None:
    def codes(model: nn.Module) -> dict[str, Tensor]:
        return {name: quantizer.to_int(each.weight) for name, each, quantizer in quantized_weights(model)}

    recipe = quantize(3, activations={"method": "minmax", "bits": 8})
    model, data = build_sam2("nano", image_size=64), calibration_data()
    teacher = copy.deepcopy(model)
    conversion = convert(model, recipe)
    find_sam2_ranges(model, data, progress=False)
    nearest = codes(copy.deepcopy(model))
    rows = round_sam2(model, data, float_layers(model, teacher, recipe), (0.01,), progress=False)
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
