"""What a user can set of a quantizer."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from qsam2.quantizers.grid import Grid
from qsam2.recipe.quantizers import AnyQuantizerSpec, LSCSpec, LSQSpec, MinMaxSpec, QuantizerSpec

ADAPTER: TypeAdapter[QuantizerSpec] = TypeAdapter(AnyQuantizerSpec)


def test_the_method_chooses_the_spec() -> None:
    for method, spec_type in (("minmax", MinMaxSpec), ("lsq", LSQSpec), ("lsc", LSCSpec)):
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


@pytest.mark.parametrize(
    "values",
    [
        {"method": "lsq", "bits": 4, "momentum": 0.9},
        {"method": "lsc", "bits": 4, "momentum": 1.0},
        {"method": "lsc", "bits": 4, "range": "mean_abs"},
        {"method": "lsq", "bits": 4, "percentile": 30},
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
    with pytest.raises(ValueError, match="call for_role first"):
        Grid.of(LSQSpec(bits=4))
