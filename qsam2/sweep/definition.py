"""The definition of a sweep: a file in Weights & Biases' format, and the recipes of its runs.

The file's `command` names the recipe: `[..., RECIPE.yaml, key=value ..., "${args_no_hyphens}"]`; its `parameters` are
dotted recipe keys. `wandb sweep FILE` and `wandb agent` read the same file.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from typing_extensions import Self

from qsam2.errors import UserError
from qsam2.recipe import Recipe, load_recipe
from qsam2.recipe.load import parse_overrides, read_yaml
from qsam2.recipe.section import Name, Section, describe, did_you_mean
from qsam2.recipe.train import DistillRecipe

Values = dict[str, Any]
"""Values of dotted recipe keys."""

S = TypeVar("S", bound=Section)

STUDY = "sweep.db"
"""SQLite file in a sweep's folder: the states of all runs."""

MAX_RUNS = 10_000
"""Most runs of a grid or table: each is checked before the first starts."""

ARGUMENTS = "${args_no_hyphens}"
SCORES = ("J&F", "J", "F", "fidelity", "seconds_per_frame")
SIZES = ("float32", "bfloat16", "packed")
LOSSES = ("mask", "dice", "iou", "class", *(f"distill_{name}" for name in DistillRecipe.model_fields))

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


def is_table(path: Path) -> bool:
    """True if a file has a table's format; raises UserError if it cannot be read."""
    return "methods" in read_yaml(path, "sweep")


def read_definition(path: Path, schema: type[S], kind: Literal["sweep", "table"]) -> S:
    """The content of a sweep's or table's file; raises UserError if it is no such file."""
    values = read_yaml(path, kind)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{kind} {path}: {describe(error, schema, kind)}") from error


def as_text(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides of a recipe."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML


class Parameter(Section):
    """One parameter, with keys as W&B documents them. `distribution` defaults to the one that fits the other keys."""

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
        keys_set = self.model_fields_set
        if self.parameters is not None:
            raise ValueError("nested parameters are not read: write dotted recipe keys, as quantize.weights.bits")
        if self.distribution is not None and self.distribution not in NEEDS:
            there = f"there are {', '.join(NEEDS)}{did_you_mean(self.distribution, NEEDS)}"
            raise ValueError(f"distribution={self.distribution!r} is unknown: {there}")
        if self.distribution is None and sum(keys <= keys_set for keys in ({"value"}, {"values"}, {"min", "max"})) != 1:
            raise ValueError("give one of value, values, or min and max")
        if lacking := [key for key in NEEDS[self.kind] if key not in keys_set]:
            raise ValueError(f"distribution={self.kind} lacks {' and '.join(lacking)}")
        if "min" in NEEDS[self.kind]:
            assert self.min is not None and self.max is not None
            if self.min >= self.max:
                raise ValueError(f"min={self.min} is not below max={self.max}")
            if self.kind == "int_uniform" and not (isinstance(self.min, int) and isinstance(self.max, int)):
                raise ValueError(f"min={self.min} and max={self.max} of int_uniform have to be whole numbers")
            if self.kind.endswith("_values") and self.min <= 0:
                raise ValueError(f"min={self.min} has no logarithm: give one above 0")
        return self

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
    def count(self) -> int:
        """The number of choices; 0 for a continuous range."""
        if self.kind == "int_uniform":
            assert isinstance(self.min, int) and isinstance(self.max, int)
            return self.max + 1 - self.min
        return len(self.choices or ())

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or both ends of a range; empty for distributions that only W&B draws."""
        if self.values is not None:
            return self.values
        if self.kind not in LOCAL:
            return ()
        to_value: Any = LOGARITHMIC.get(self.kind, lambda end: end)
        return to_value(self.min), to_value(self.max)

    def __str__(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(map(str, self.values))}"
        if self.kind not in LOCAL:
            return self.kind
        step = f" in steps of {self.q:g}" if self.kind == "q_uniform" else ""
        return f"{self.kind} from {self.ends[0]:g} to {self.ends[1]:g}{step}"


class Metric(Section):
    """The metric that runs are compared by: a figure of `metrics.json`, as quantized/J&F, or a curve, as loss."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None
    """The sweep ends once a run reaches this value."""


class Hyperband(Section):
    """Early stopping of runs that are not among the best 1/eta at a rung. Iterations are logged values of the metric.

    The first rung is at min_iter, or at max_iter / eta^s iterations; each further rung at eta times as many.
    """

    type: Literal["hyperband"]
    min_iter: PositiveInt | None = None
    max_iter: PositiveInt | None = None
    s: PositiveInt | None = None
    eta: Annotated[int, Field(ge=2)] = 3
    strict: bool = True
    """Read by W&B only; local sweeps always apply the strict rule."""

    @property
    def first(self) -> int:
        """Iterations at the first rung."""
        return self.min_iter or max((self.max_iter or 0) // self.eta ** (self.s or 0), 1)


class SweepDefinition(Section):
    """The file's keys, as W&B documents them."""

    name: Name | None = None
    """Default: the file's name."""
    description: str = ""
    """May say `N s per run` (or `N s a run`), which estimates start from."""
    project: str | None = None
    entity: str | None = None
    program: str | None = None
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    early_terminate: Hyperband | None = None
    run_cap: PositiveInt | None = None
    """Number of runs in all; a grid ends by itself."""


@dataclass(frozen=True)
class Sweep:
    """A sweep whose runs were checked to be valid recipes."""

    file: Path
    definition: SweepDefinition
    recipe: Path
    overrides: tuple[str, ...]
    """Overrides of all runs: those of the file's command, then the user's."""

    @property
    def name(self) -> str:
        """Name of the sweep and of its runs' W&B group."""
        return self.definition.name or self.file.stem

    @property
    def constants(self) -> Values:
        """Parameters of one value."""
        return {key: values.value for key, values in self.definition.parameters.items() if values.kind == "constant"}

    @property
    def drawn(self) -> dict[str, Parameter]:
        """Parameters that differ between runs."""
        return {key: values for key, values in self.definition.parameters.items() if values.kind != "constant"}

    @property
    def run_seconds(self) -> float | None:
        """Duration of a run by the file's description."""
        seconds = re.search(r"(\d+(?:\.\d+)?) s (?:a|per) run", self.definition.description)
        return float(seconds[1]) if seconds else None

    @property
    def logs_online(self) -> bool:
        """True if the runs may log to a W&B account."""
        return self.recipe_of(next(edges(self))).log.wandb in ("auto", "online")

    def arguments(self, values: Values, before: Iterable[str] = (), after: Iterable[str] = ()) -> list[str]:
        """Overrides of one run; the file's and the run's replace those of `before`, and `after` replaces all."""
        return [*before, *self.overrides, *as_text({**self.constants, **values}), *after]

    def recipe_of(self, values: Values) -> Recipe:
        """The recipe of one run; raises UserError that names the run."""
        try:
            return load_recipe(self.recipe, self.arguments(values))
        except UserError as error:
            run = ", ".join(as_text(values)) or "its constants"
            raise UserError(f"sweep {self.file}, {run}: {error}") from error

    def command_of(self, values: Values) -> str:
        """The command that carries out one run outside the sweep."""
        return shlex.join(["qsam2", "train", str(self.recipe), *self.arguments(values)])


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep and check all of its runs (of ranges: both ends).

    Raises:
        UserError: the file is no sweep, the recipe of a run is not valid, or no run has the metric.
    """
    path, overrides = Path(path), tuple(overrides)
    definition = read_definition(path, SweepDefinition, "sweep")
    _check_method(path, definition)
    recipe, fixed = _read_command(path, definition)
    for override in overrides:
        if (key := override.partition("=")[0]) in definition.parameters:
            raise UserError(f"{override}: {key} is a parameter of the sweep {path}; change it there")
    parse_overrides(overrides)
    sweep = Sweep(path, definition, recipe, (*fixed, *overrides))
    if definition.method == "grid" and (count := grid_size(sweep)) > MAX_RUNS:
        raise UserError(
            f"sweep {path}: its grid has {count:,} runs, at most {MAX_RUNS:,} are carried out: give fewer values, or "
            "method random or bayes with run_cap"
        )
    for values in combinations(sweep) if definition.method == "grid" else edges(sweep):
        _check_metric(sweep, sweep.recipe_of(values))
    return sweep


def grid_size(sweep: Sweep) -> int:
    """The number of runs of a grid."""
    return math.prod(parameter.count for parameter in sweep.drawn.values())


def combinations(sweep: Sweep) -> Iterator[Values]:
    """All runs of a grid, the last parameter changing first."""
    choices = [parameter.choices or () for parameter in sweep.drawn.values()]
    return (dict(zip(sweep.drawn, values, strict=True)) for values in product(*choices))


def edges(sweep: Sweep) -> Iterator[Values]:
    """Runs with every choice and both ends of every range, one parameter changed at a time."""
    ends = {key: parameter.ends for key, parameter in sweep.drawn.items() if parameter.ends}
    first = {key: values[0] for key, values in ends.items()}
    yield first
    for key, values in ends.items():
        yield from ({**first, key: value} for value in values[1:])


def count_runs(sweep: Sweep, runs: int | None) -> int:
    """The number of runs in all, at most `runs`; raises UserError if nothing limits it."""
    limits = [limit for limit in (runs, sweep.definition.run_cap) if limit is not None]
    if sweep.definition.method == "grid":
        limits.append(grid_size(sweep))
    elif not limits:
        raise UserError(f"sweep {sweep.file}: method {sweep.definition.method} has no end: give --count N or run_cap")
    return min(limits)


def _check_metric(sweep: Sweep, recipe: Recipe) -> None:
    models = ["quantized", "float"] if recipe.quantize else ["float"]
    if recipe.quantize and (recipe.evaluate.after_calibration or not recipe.train):
        models.insert(1, "ptq")
    curves = ["loss", *(f"loss/{name}" for name in LOSSES)] if recipe.train else []
    known = [f"{model}/{score}" for model in models for score in SCORES] + [f"bytes/{size}" for size in SIZES] + curves
    name = sweep.definition.metric.name
    if name not in known:
        raise UserError(
            f"sweep {sweep.file}: metric.name={name!r} is logged by no run of {sweep.recipe}; it logs "
            f"{', '.join(known)}{did_you_mean(name, known, cutoff=0.0)}"
        )
    if sweep.definition.early_terminate and name not in curves:
        instead = f"give one of {', '.join(curves)}, or remove" if curves else "these do not train: remove"
        raise UserError(
            f"sweep {sweep.file}: early_terminate needs a metric that is logged during training, and {name!r} is known "
            f"at the end of a run; {instead} early_terminate"
        )


def _check_method(path: Path, definition: SweepDefinition) -> None:
    rule = definition.early_terminate
    if rule and rule.min_iter is None and (rule.max_iter is None or rule.s is None):
        raise UserError(f"sweep {path}: early_terminate lacks its first rung: give min_iter, or max_iter and s")
    for key, parameter in definition.parameters.items():
        if definition.method == "grid" and not parameter.count:
            raise UserError(
                f"sweep {path}: parameters.{key} has the distribution {parameter.kind}, which a grid cannot walk "
                "through: give values, or method random or bayes"
            )


def _read_command(path: Path, definition: SweepDefinition) -> tuple[Path, list[str]]:
    """The base recipe and the overrides that a file's command holds."""
    words, example = definition.command, f'[..., RECIPE.yaml, key=value, "{ARGUMENTS}"]'
    recipes = [index for index, word in enumerate(words) if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(recipes) != 1:
        count = "more than one" if recipes else "no"
        raise UserError(f"sweep {path}: command names {count} recipe; write {example}")
    if ARGUMENTS not in words:
        raise UserError(f"sweep {path}: command lacks {ARGUMENTS}, the values of a run; write {example}")
    if "${program}" in words and definition.program is None:
        raise UserError(f"sweep {path}: lacks the key 'program', which its command uses; give program: train.py")
    return Path(words[recipes[0]]), [word for word in words[recipes[0] + 1 :] if word != ARGUMENTS]
