"""Layers that compute in integers: what they give is what fake quantization gives, and others stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sam2.modeling.sam2_utils import MLP
from small_predictors import random_nano
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.fast.integers import IntegerLinear, multiplies_bytes, use_integers
from qsam2.fast.model import make_fast
from qsam2.layers.convert import convert, quantized_weights, quantizers, set_state
from qsam2.layers.weight import QuantLinear
from qsam2.quantizers import QuantizerState
from qsam2.recipe.quantize import QuantizeRecipe

CPU = torch.device("cpu")
needs_vnni = pytest.mark.skipif(not multiplies_bytes(CPU), reason="this processor does not multiply bytes (VNNI)")


class Part(nn.Module):
    """Named as what is replaced."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(inside)

    @property
    def inside(self) -> Any:
        return self.image_encoder[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.image_encoder(x)


def quantized(inside: nn.Module, x: torch.Tensor, weights: dict[str, Any], activations: dict[str, Any]) -> Part:
    part = Part(inside).eval().requires_grad_(False)
    method = {"method": "minmax", "range": "minmax"}
    convert(part, QuantizeRecipe.model_validate({"weights": method | weights, "activations": method | activations}))
    find_ranges(part, part, [x])
    return part


def in_integers(part: Part) -> Part:
    fast = copy.deepcopy(part)
    use_integers(fast, torch.float32)
    return fast


def mlp(activation: type[nn.Module] = nn.GELU, **options: Any) -> MLP:
    return MLP(24, 40, 16, 2, activation=activation, **options)


@needs_vnni
@settings(max_examples=60, deadline=None)
@given(
    weight_bits=st.integers(2, 8),
    input_bits=st.integers(2, 8),
    input_grid=st.sampled_from([(True, "mid_tread"), (True, "mid_rise"), (False, "mid_tread"), (False, "least_error")]),
    granularity=st.sampled_from(["tensor", "channel"]),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    features=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 10**6),
)
def test_a_layer_gives_what_fake_quantization_gives(
    weight_bits: int, input_bits: int, input_grid: tuple[bool, str], granularity: str, shape: list[int],
    features: tuple[int, int], seed: int,
) -> None:  # fmt: skip
    symmetric, grid = input_grid
    assume(input_bits < 8 or grid == "mid_tread")
    torch.manual_seed(seed)
    x = torch.randn(*shape, features[0]) * 3 + 1
    part = quantized(
        nn.Linear(*features),
        x,
        {"bits": weight_bits, "granularity": granularity},
        {"bits": input_bits, "symmetric": symmetric, "grid": grid},
    )
    fast = in_integers(part)
    assert type(fast.inside) is IntegerLinear
    for values in (x, 100 * x):  # those beyond the range are clipped
        expected, found = part(values), fast(values)
        assert found.shape == expected.shape and found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))
    use_integers(part, torch.bfloat16)
    found = part(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), fast(x.bfloat16()), rtol=0.01, atol=0.01)


@needs_vnni
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_two_layers_hand_over_integers(bits: int, activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 50, 24)
    part = quantized(mlp(activation), x, {"bits": 8}, {"bits": bits})
    fast = in_integers(part)
    first, second = fast.inside.layers
    assert isinstance(fast.inside.act, nn.Identity)
    assert first.output_grid == (second.input_scale, second.zero_point, second.largest)
    codes = first(x)
    expected = part.inside.layers[1].input_quantizer.to_int(activation()(part.inside.layers[0](x)))
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 2**bits - 1
    apart = (codes.int() - expected).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.01, "ties alone may fall otherwise"
    step = float(second.input_scale * second.weight_scale.max() * 127)
    torch.testing.assert_close(fast(x), part(x), rtol=1e-3, atol=2 * step)


@needs_vnni
def test_a_zero_point_between_codes_is_handed_on_in_floats() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 50, 24)
    part = quantized(mlp(nn.GELU), x, {"bits": 8}, {"bits": 2, "symmetric": True, "grid": "mid_rise"})
    fast = in_integers(part)
    assert all(type(layer) is IntegerLinear and not layer.output_grid for layer in fast.inside.layers)
    torch.testing.assert_close(fast(x), part(x), rtol=1e-3, atol=1e-3)


def test_layers_without_integers_stay_as_they_are() -> None:
    x = torch.randn(8, 24)
    usual = {"bits": 4}
    for weights, activations in (
        (usual, {"bits": 8, "symmetric": True, "grid": "mid_rise"}),
        ({"bits": 8, "symmetric": True, "grid": "mid_rise"}, usual),
        ({"bits": 4, "symmetric": False, "grid": "mid_tread"}, usual),
    ):
        fast = in_integers(quantized(nn.Linear(24, 16), x, weights, activations))
        assert type(fast.inside) is QuantLinear, (weights, activations)
    float_inputs = quantized(nn.Linear(24, 16), x, usual, usual)
    set_state(float_inputs, QuantizerState.FLOAT)
    weights_alone = Part(nn.Linear(24, 16))
    convert(weights_alone, QuantizeRecipe.model_validate({"weights": {"method": "minmax", "bits": 4}}))
    elsewhere = nn.Module()
    elsewhere.mask_decoder = quantized(nn.Linear(24, 16), x, usual, usual).inside
    for part in (float_inputs, weights_alone, elsewhere, Part(nn.Linear(24, 16))):
        before = [type(module) for module in part.modules()]
        use_integers(part, torch.float32)
        assert [type(module) for module in part.modules()] == before


@needs_vnni
def test_layers_with_something_else_between_them_do_not_hand_over_integers() -> None:
    x = torch.randn(8, 24)
    tanh = mlp()
    tanh.act = nn.GELU(approximate="tanh")
    kept = quantized(mlp(), x, {"bits": 8}, {"bits": 8})
    kept.inside.layers[0].input_quantizer.state = QuantizerState.FLOAT
    for part in (
        quantized(tanh, x, {"bits": 8}, {"bits": 8}),
        quantized(mlp(nn.SiLU), x, {"bits": 8}, {"bits": 8}),
        quantized(mlp(sigmoid_output=True), x, {"bits": 8}, {"bits": 8}),
        kept,
    ):
        fast = in_integers(part)
        assert type(fast.inside.act) is type(part.inside.act)
        assert not any(isinstance(layer, IntegerLinear) and layer.output_grid for layer in fast.modules())
        torch.testing.assert_close(fast(x), part(x), rtol=1e-3, atol=1e-3)


def test_what_multiplies_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_bytes(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "onednn", object())
        assert not multiplies_bytes(CPU)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not multiplies_bytes(CPU)
    assert not any(isinstance(module, IntegerLinear) for module in make_fast(whole()).modules())


def whole() -> Any:
    """nano at W8A8 with ranges of noise."""
    torch.manual_seed(0)
    model = random_nano()
    spec = {"method": "minmax", "bits": 8}
    rules = [{"match": name, "keep_float": True} for name in ("sam_*", "obj_ptr_*", "mask_downsample")]
    convert(model, QuantizeRecipe.model_validate({"weights": spec, "activations": spec, "rules": rules}))
    for _, layer, quantizer in quantized_weights(model):
        quantizer.initialize_from(layer.weight)
    for _, quantizer in quantizers(model):
        if quantizer.role == "activation":
            quantizer.initialize_from(torch.randn(1000))
    return model


@needs_vnni
def test_all_linear_layers_of_encoder_and_memory_are_replaced_but_projections_of_the_memory_attention(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "qsam2")
    model = whole()
    names = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    fast = make_fast(model)
    replaced = {name for name, module in fast.named_modules() if isinstance(module, IntegerLinear)}
    attention = {name for name in names if name.startswith("memory_attention.") and "attn" in name}
    assert replaced == names - attention and len(attention) > 8 and len(replaced) > 40
    assert sum(layer.output_grid is not None for layer in map(fast.get_submodule, replaced)) >= 12
    assert f"fast: {len(replaced)} linear layers compute with integers; other products" in caplog.text


@pytest.mark.parametrize(
    "able, why", [(True, "no layer has weights and activations to do so"), (False, "this cpu would not gain")]
)
def test_the_log_says_why_nothing_computes_with_integers(
    able: bool, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "qsam2")
    monkeypatch.setattr("qsam2.fast.model.multiplies_bytes", lambda device: able)
    make_fast(random_nano(), torch.bfloat16)
    expected = f"fast: no integers, as {why}; other products of image encoder and memory in bfloat16"
    assert [record.message for record in caplog.records] == [expected]
