"""Settings of a quantizer in a recipe."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from qsam2.errors import UserError
from qsam2.quantizers.grid import Grid
from qsam2.recipe.load import build_recipe
from qsam2.recipe.quantizer_specs import AnyQuantizerSpec, LSQPlusSpec, LSQSpec, QuantizerSpec, Role, methods

ADAPTER: TypeAdapter[QuantizerSpec] = TypeAdapter(AnyQuantizerSpec)
ROLES: tuple[Role, ...] = ("weight", "activation")
WEIGHTS_ONLY, ACTIVATIONS_ONLY = ("dorefa", "sawb", "statsq", "seq"), ("pact",)


def spec_of(method: str, bits: int = 4, **values: object) -> QuantizerSpec:
    return ADAPTER.validate_python({"method": method, "bits": bits, **values})


def test_the_method_chooses_the_spec() -> None:
    names = "minmax percentile mse entropy lsq lsq_plus pact dorefa sawb statsq seq lsc"
    assert list(methods()) == names.split()
    for method, spec_type in methods().items():
        spec = spec_of(method)
        assert type(spec) is spec_type and ADAPTER.validate_python(spec.model_dump()) == spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            ({"method": "lsq", "bits": bits}, f"bits={bits} is not supported: give 2 to 8, or null")
            for bits in (-1, 0, 1, 9, 33)
        ),
        ({"method": "lsq", "bits": 2, "grid": "mid_rise", "symmetric": False}, "symmetric=true, or grid=mid_tread"),
        (
            {"method": "lsq", "bits": 2, "grid": "least_error", "symmetric": True},
            "grid=least_error places the zero point: use it with symmetric=false",
        ),
        ({"method": "lsq", "bits": 4, "momentum": 0.9}, ""),
        ({"method": "lsc", "bits": 4, "momentum": 1.1}, ""),
        ({"method": "lsc", "bits": 4, "range": "mean_abs"}, ""),
        ({"method": "lsq", "bits": 4, "percentile": 30}, ""),
        ({"method": "mse", "bits": 4, "range": "minmax"}, ""),
        ({"method": "statsq", "bits": 4, "range": "mse"}, ""),
        ({"method": "pact", "bits": 4, "decay": -1.0}, ""),
        ({"method": "nothing", "bits": 4}, ""),
        ({"bits": 4}, ""),
    ],
)
def test_what_a_spec_refuses(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        ADAPTER.validate_python(values)


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        LSQSpec(bits=4).bits = 2  # type: ignore[misc]


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_defaults_of_the_roles(method: str, bits: int) -> None:
    spec_type = methods()[method]
    if "weight" in spec_type.roles:
        weight: Any = spec_of(method, bits).for_role("weight")
        mid_rise = bits == 2 or method in ("dorefa", "sawb", "statsq")
        assert (weight.symmetric, weight.granularity) == (True, "channel")
        assert weight.grid == ("mid_rise" if mid_rise else "mid_tread")
        if "activation" in spec_type.roles and method != "lsq_plus":
            assert weight.for_role("activation") == weight  # resolved is resolved
    if "activation" in spec_type.roles:
        activation = spec_of(method, bits).for_role("activation")
        least_error = method in ("lsc", "mse") and bits <= 3
        assert (activation.symmetric, activation.granularity) == (False, "tensor")
        assert activation.grid == ("least_error" if least_error else "mid_tread")
        if method != "lsq_plus":
            assert spec_of(method, bits, symmetric=True).for_role("activation").grid == "mid_tread"


def test_given_values_are_kept() -> None:
    spec = LSQSpec(bits=4, symmetric=True, granularity="channel").for_role("activation")
    assert spec.symmetric and spec.granularity == "channel"
    assert LSQSpec(bits=2, symmetric=False).for_role("weight").grid == "mid_tread"
    assert LSQSpec(bits=2, grid="mid_tread").for_role("weight").grid == "mid_tread"
    assert LSQSpec(bits=2, grid="mid_rise").for_role("activation").symmetric
    assert LSQSpec(bits=2, grid="least_error").for_role("activation").symmetric is False
    assert LSQPlusSpec(bits=4).for_role("weight").range == "three_sigma"
    assert LSQPlusSpec(bits=4).for_role("activation").range == "mse"
    assert LSQPlusSpec(bits=4, range="minmax").for_role("weight").range == "minmax"


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_the_grids(bits: int) -> None:
    symmetric, affine = (Grid.of(LSQSpec(bits=bits).for_role(role)) for role in ROLES)
    assert (symmetric.qmin, symmetric.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (affine.qmin, affine.qmax) == (0, 2**bits - 1)


def error_of(**quantize: dict[str, object]) -> str:
    with pytest.raises(UserError) as caught:
        build_recipe({"name": "x", "quantize": quantize})
    return str(caught.value)


@pytest.mark.parametrize("method", methods())
def test_a_recipe_takes_a_method_in_its_place_only(method: str) -> None:
    spec = {"method": method, "bits": 3}
    for role, other, wrong in (("activation", "weight", WEIGHTS_ONLY), ("weight", "activation", ACTIVATIONS_ONLY)):
        if method not in wrong:
            recipe = build_recipe({"name": "x", "quantize": {f"{role}s": spec}})
            assert build_recipe(recipe.model_dump(mode="json")) == recipe
            continue
        beginning, given = error_of(**{f"{role}s": spec}).split(" one of ")
        assert beginning == f"quantize.{role}s: method={method} is for {other}s only: give {role}s"
        assert given.split(", ") == [name for name in methods() if name not in wrong]


AN_OFFSET = "quantize.activations: method=lsq_plus learns an offset: give symmetric=false and grid=auto, or method=lsq"
MID_RISE = ("dorefa", "sawb", "statsq")


@pytest.mark.parametrize(
    ("method", "role", "values", "message"),
    [
        (
            *("lsq", "weights", {"grid": "least_error"}),
            "quantize.weights: grid=least_error is for activations only: give weights auto, mid_tread or mid_rise",
        ),
        (
            *("lsq_plus", "weights", {"symmetric": False}),
            "quantize.weights: method=lsq_plus has an offset for activations only: weights need symmetric=true",
        ),
        ("lsq_plus", "activations", {"symmetric": True}, AN_OFFSET),
        ("lsq_plus", "activations", {"grid": "mid_rise"}, AN_OFFSET),
        *(
            (m, "weights", {"grid": "mid_tread"}, "quantize.weights.grid='mid_tread': should be 'mid_rise'")
            for m in MID_RISE
        ),
        *((m, "weights", {"symmetric": False}, "quantize.weights.symmetric=False: should be True") for m in MID_RISE),
    ],
)
def test_what_a_recipe_refuses_of_a_method(method: str, role: str, values: dict[str, object], message: str) -> None:
    assert error_of(**{role: {"method": method, "bits": 4, **values}}) == message
