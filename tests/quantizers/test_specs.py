"""Settings of a quantizer in a recipe."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from qsam2.errors import UserError
from qsam2.quantizers.grid import Grid
from qsam2.recipe.load import build_recipe
from qsam2.recipe.quantizer_specs import (
    AnyQuantizerSpec,
    LSCSpec,
    LSQPlusSpec,
    LSQSpec,
    MinMaxSpec,
    QuantizerSpec,
    Role,
    SEQSpec,
    methods,
)

ADAPTER: TypeAdapter[QuantizerSpec] = TypeAdapter(AnyQuantizerSpec)


def test_the_method_chooses_the_spec() -> None:
    names = "minmax percentile mse entropy lsq lsq_plus pact dorefa sawb statsq seq lsc"
    assert list(methods()) == names.split()
    for method, spec_type in methods().items():
        spec = ADAPTER.validate_python({"method": method, "bits": 4})
        assert type(spec) is spec_type
        assert ADAPTER.validate_python(spec.model_dump()) == spec


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 33])
def test_impossible_bits(bits: int) -> None:
    with pytest.raises(ValidationError, match=f"bits={bits} is not supported: give 2 to 8, or null"):
        LSQSpec(bits=bits)


def test_mid_rise_needs_symmetric() -> None:
    with pytest.raises(ValidationError, match="use it with symmetric=true, or grid=mid_tread"):
        LSQSpec(bits=2, grid="mid_rise", symmetric=False)


def test_the_grid_of_least_error_is_for_affine_activations() -> None:
    with pytest.raises(ValidationError, match="grid=least_error places the zero point: use it with symmetric=false"):
        LSQSpec(bits=2, grid="least_error", symmetric=True)
    assert error_of(weights={"method": "lsq", "bits": 2, "grid": "least_error"}) == (
        "quantize.weights: grid=least_error is for activations only: give weights auto, mid_tread or mid_rise"
    )
    assert LSQSpec(bits=2, grid="least_error").for_role("activation").symmetric is False


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_which_methods_have_the_grid_of_least_error_by_themselves(method: str, bits: int) -> None:
    spec_type = methods()[method]
    if "activation" not in spec_type.roles:
        pytest.skip("a method for weights")
    spec = spec_type(method=method, bits=bits)
    assert (spec.for_role("activation").grid == "least_error") == (method in ("lsc", "mse") and bits <= 3)
    if method != "lsq_plus":
        symmetric = spec_type(method=method, bits=bits, symmetric=True)
        assert symmetric.for_role("activation").grid == "mid_tread"


@pytest.mark.parametrize(
    "values",
    [
        {"method": "lsq", "bits": 4, "momentum": 0.9},
        {"method": "lsc", "bits": 4, "momentum": 1.1},
        {"method": "lsc", "bits": 4, "range": "mean_abs"},
        {"method": "lsq", "bits": 4, "percentile": 30},
        {"method": "mse", "bits": 4, "range": "minmax"},
        {"method": "statsq", "bits": 4, "range": "mse"},
        {"method": "pact", "bits": 4, "decay": -1.0},
        {"method": "nothing", "bits": 4},
        {"bits": 4},
    ],
)
def test_what_a_spec_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(values)


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        LSQSpec(bits=4).bits = 2  # type: ignore[misc]


@pytest.mark.parametrize("spec_type", [MinMaxSpec, LSQSpec, LSCSpec])
def test_defaults_of_the_roles(spec_type: type[QuantizerSpec]) -> None:
    weight, activation = spec_type(bits=4).for_role("weight"), spec_type(bits=4).for_role("activation")
    assert (weight.symmetric, weight.granularity, weight.grid) == (True, "channel", "mid_tread")
    assert (activation.symmetric, activation.granularity, activation.grid) == (False, "tensor", "mid_tread")
    assert weight.for_role("activation") == weight  # resolved is resolved


def test_grid_of_two_bits() -> None:
    assert LSQSpec(bits=2).for_role("weight").grid == "mid_rise"
    assert LSQSpec(bits=2, symmetric=False).for_role("weight").grid == "mid_tread"
    assert LSQSpec(bits=2, grid="mid_tread").for_role("weight").grid == "mid_tread"
    assert LSQSpec(bits=2, symmetric=True).for_role("activation").grid == "mid_tread"
    assert LSQSpec(bits=2, grid="mid_rise").for_role("activation").symmetric


def test_given_values_are_kept() -> None:
    spec = LSQSpec(bits=4, symmetric=True, granularity="channel").for_role("activation")
    assert spec.symmetric and spec.granularity == "channel"


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_the_grids(bits: int) -> None:
    symmetric = Grid.of(LSQSpec(bits=bits).for_role("weight"))
    assert (symmetric.qmin, symmetric.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    affine = Grid.of(LSQSpec(bits=bits).for_role("activation"))
    assert (affine.qmin, affine.qmax) == (0, 2**bits - 1)


def test_an_unresolved_spec_makes_no_grid() -> None:
    with pytest.raises(AssertionError, match="call for_role first"):
        Grid.of(LSQSpec(bits=4))


WEIGHTS_ONLY, ACTIVATIONS_ONLY = ("dorefa", "sawb", "statsq", "seq"), ("pact",)


def error_of(**quantize: dict[str, object]) -> str:
    with pytest.raises(UserError) as caught:
        build_recipe({"name": "x", "quantize": quantize})
    return str(caught.value)


@pytest.mark.parametrize("method", methods())
def test_a_recipe_refuses_a_method_in_the_wrong_place(method: str) -> None:
    spec = {"method": method, "bits": 4}
    for role, wrong in (("activation", WEIGHTS_ONLY), ("weight", ACTIVATIONS_ONLY)):
        if method not in wrong:
            build_recipe({"name": "x", "quantize": {f"{role}s": spec}})
            continue
        message = error_of(**{f"{role}s": spec})
        right = "weight" if role == "activation" else "activation"
        expected = (
            f"quantize.{role}s: method={method} is for {right}s only: give {role}s one of minmax, percentile, mse"
        )
        assert message.startswith(expected)
        given = message.split(" one of ")[1].split(", ")
        assert given == [name for name in methods() if name not in wrong]


def test_lsq_plus_is_symmetric_for_weights_and_has_an_offset_for_activations() -> None:
    spec = {"method": "lsq_plus", "bits": 4}
    assert error_of(weights={**spec, "symmetric": False}) == (
        "quantize.weights: method=lsq_plus has an offset for activations only: weights need symmetric=true"
    )
    for wrong in ({"symmetric": True}, {"grid": "mid_rise"}):
        assert error_of(activations={**spec, **wrong}) == (
            "quantize.activations: method=lsq_plus learns an offset: give symmetric=false and grid=auto, or method=lsq"
        )
    assert LSQPlusSpec(bits=4).for_role("weight").range == "three_sigma"
    assert LSQPlusSpec(bits=4).for_role("activation").range == "mse"
    assert LSQPlusSpec(bits=4, range="minmax").for_role("weight").range == "minmax"


@pytest.mark.parametrize("method", ["dorefa", "sawb", "statsq"])
def test_weight_methods_that_are_mid_rise_at_all_bits(method: str) -> None:
    spec = {"method": method, "bits": 8}
    assert ADAPTER.validate_python(spec).for_role("weight").grid == "mid_rise"
    assert error_of(weights={**spec, "grid": "mid_tread"}) == "quantize.weights.grid='mid_tread': should be 'mid_rise'"
    assert error_of(weights={**spec, "symmetric": False}) == "quantize.weights.symmetric=False: should be True"


def test_seq_is_stretched_at_two_bits_only() -> None:
    assert [SEQSpec(bits=bits).for_role("weight").grid for bits in (2, 3, 8)] == ["mid_rise", "mid_tread", "mid_tread"]


def test_a_recipe_of_any_method_can_be_saved_and_read() -> None:
    roles: tuple[Role, ...] = ("weight", "activation")
    for method, spec_type in methods().items():
        for role in (role for role in roles if role in spec_type.roles):
            recipe = build_recipe({"name": "x", "quantize": {f"{role}s": {"method": method, "bits": 3}}})
            assert build_recipe(recipe.model_dump(mode="json")) == recipe
