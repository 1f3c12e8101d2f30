"""One parameter of a sweep in Weights & Biases' format: a value, a list of values, or a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, model_validator
from typing_extensions import Self

from qsam2.recipe.section import Section

LOCAL = {
    "constant": ("value",),
    "categorical": ("values",),
    **dict.fromkeys(("int_uniform", "uniform", "q_uniform", "log_uniform", "log_uniform_values"), ("min", "max")),
}
"""Distributions that can be drawn without W&B, with their keys that have no default."""

RANGES = ("inv_log_uniform", "inv_log_uniform_values", "q_log_uniform", "q_log_uniform_values")
NEEDS = {
    **LOCAL,
    "categorical_w_probabilities": ("values", "probabilities"),
    **dict.fromkeys(RANGES, ("min", "max")),
    **dict.fromkeys(("normal", "q_normal", "log_normal", "q_log_normal", "beta", "q_beta"), ()),
}
"""All distributions of W&B."""

LOGARITHMIC: dict[str, Callable[[float], float]] = {"log_uniform": math.exp, "log_uniform_values": float}
"""Distributions that are uniform in the logarithm, with the function from a bound to a value."""


class Parameter(Section):
    """Keys as W&B documents them. `distribution` defaults to the one that fits the other keys."""

    value: Any = None
    values: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    probabilities: tuple[float, ...] | None = None
    distribution: str | None = None
    min: int | float | None = None
    max: int | float | None = None
    q: PositiveFloat = 1.0
    mu: float = 0.0
    sigma: float = 1.0
    a: float = 1.0
    b: float = 1.0
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_one_distribution(self) -> Self:
        if self.parameters is not None:
            raise ValueError("nested parameters are not read: write dotted recipe keys, as quantize.weights.bits")
        if self.distribution is not None and self.distribution not in NEEDS:
            near = get_close_matches(self.distribution, NEEDS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"distribution={self.distribution!r} is unknown: there are {', '.join(NEEDS)}{hint}")
        keys_set = self.model_fields_set
        if self.distribution is None and sum(keys <= keys_set for keys in ({"value"}, {"values"}, {"min", "max"})) != 1:
            raise ValueError("give one of value, values, or min and max")
        lacking = [key for key in NEEDS[self.kind] if key not in keys_set]
        if lacking:
            raise ValueError(f"distribution={self.kind} lacks {' and '.join(lacking)}")
        if "min" in NEEDS[self.kind]:
            self._check_range()
        return self

    def _check_range(self) -> None:
        assert self.min is not None and self.max is not None
        if self.min >= self.max:
            raise ValueError(f"min={self.min} is not below max={self.max}")
        if self.kind == "int_uniform" and not (isinstance(self.min, int) and isinstance(self.max, int)):
            raise ValueError(f"min={self.min} and max={self.max} of int_uniform have to be whole numbers")
        if self.kind.endswith("_values") and self.min <= 0:
            raise ValueError(f"min={self.min} has no logarithm: give one above 0")

    @property
    def kind(self) -> str:
        """Name of the distribution."""
        if self.distribution is not None:
            return self.distribution
        if "value" in self.model_fields_set:
            return "constant"
        if self.values is not None:
            return "categorical" if self.probabilities is None else "categorical_w_probabilities"
        return "int_uniform" if isinstance(self.min, int) and isinstance(self.max, int) else "uniform"

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """All values; None for a continuous range."""
        if self.kind == "constant":
            return (self.value,)
        if self.kind == "int_uniform":
            return tuple(range(self.min, self.max + 1))  # type: ignore[arg-type, operator]
        return self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or both ends of a range; empty for distributions that only W&B draws."""
        if self.values is not None:
            return self.values
        if self.kind not in LOCAL:
            return ()
        assert self.min is not None and self.max is not None
        to_value = LOGARITHMIC.get(self.kind, lambda end: end)
        return to_value(self.min), to_value(self.max)

    def __str__(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(map(str, self.values))}"
        if self.kind not in LOCAL:
            return self.kind
        step = f" in steps of {self.q:g}" if self.kind == "q_uniform" else ""
        return f"{self.kind} from {self.ends[0]:g} to {self.ends[1]:g}{step}"
