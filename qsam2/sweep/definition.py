"""The definition of a sweep: a file in Weights & Biases' format, and the recipes of its runs.

The file's `command` names the recipe: `[..., RECIPE.yaml, key=value ..., "${args_no_hyphens}"]`; its `parameters` are
dotted recipe keys (`parameters`). `wandb sweep FILE` and `wandb agent` read the same file.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PositiveInt, ValidationError

from qsam2.errors import UserError
from qsam2.recipe import Recipe, load_recipe
from qsam2.recipe.load import parse_overrides, read_yaml
from qsam2.recipe.section import Section, describe
from qsam2.sweep.parameters import Parameter

Values = dict[str, Any]
"""Values of dotted recipe keys."""

S = TypeVar("S", bound=Section)

STUDY = "sweep.db"
"""SQLite file in a sweep's folder: the states of all runs."""

ARGUMENTS = "${args_no_hyphens}"
SCORES = ("J&F", "J", "F", "fidelity", "seconds_per_frame")
SIZES = ("float32", "bfloat16", "packed")
LOSSES = ("mask", "dice", "iou", "class", "distill_imagenet", "distill_masks", "distill_embeddings")


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
        if self.min_iter is None:
            assert self.max_iter is not None and self.s is not None
            return max(self.max_iter // self.eta**self.s, 1)
        return self.min_iter


class SweepDefinition(Section):
    """The file's keys, as W&B documents them."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")] | None = None
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
    _check_stopping(path, definition)
    recipe, fixed = _read_command(path, definition)
    for override in overrides:
        if (key := override.partition("=")[0]) in definition.parameters:
            raise UserError(f"{override}: {key} is a parameter of the sweep {path}; change it there")
    parse_overrides(overrides)
    sweep = Sweep(path, definition, recipe, (*fixed, *overrides))
    for values in combinations(sweep) if definition.method == "grid" else edges(sweep):
        _check_metric(sweep, sweep.recipe_of(values))
    return sweep


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
        limits.append(sum(1 for _ in combinations(sweep)))
    elif not limits:
        raise UserError(f"sweep {sweep.file}: method {sweep.definition.method} has no end: give --count N or run_cap")
    return min(limits)


def curves(recipe: Recipe) -> list[str]:
    """Names of the metrics that a run logs during training."""
    return ["loss", *(f"loss/{name}" for name in LOSSES)] if recipe.train else []


def _check_metric(sweep: Sweep, recipe: Recipe) -> None:
    models = ["float"] if recipe.quantize is None else ["float", "ptq", "quantized"]
    if recipe.train and not recipe.evaluate.after_calibration and "ptq" in models:
        models.remove("ptq")
    known = [f"{model}/{score}" for model in models[::-1] for score in SCORES] + [f"bytes/{size}" for size in SIZES]
    name, reported = sweep.definition.metric.name, curves(recipe)
    if name not in known + reported:
        near = get_close_matches(name, known + reported, n=1, cutoff=0.0)[0]
        raise UserError(
            f"sweep {sweep.file}: metric.name={name!r} is logged by no run of {sweep.recipe}; it logs "
            f"{', '.join(known + reported)}; did you mean {near!r}?"
        )
    if sweep.definition.early_terminate and name not in reported:
        instead = f"give one of {', '.join(reported)}, or remove" if reported else "these do not train: remove"
        raise UserError(
            f"sweep {sweep.file}: early_terminate needs a metric that is logged during training, and {name!r} is known "
            f"at the end of a run; {instead} early_terminate"
        )


def _check_stopping(path: Path, definition: SweepDefinition) -> None:
    rule = definition.early_terminate
    if rule and rule.min_iter is None and (rule.max_iter is None or rule.s is None):
        raise UserError(f"sweep {path}: early_terminate lacks its first rung: give min_iter, or max_iter and s")
    if definition.method == "grid":
        for key, parameter in definition.parameters.items():
            if parameter.choices is None:
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
