"""A sweep as a file in Weights & Biases' format defines it, and the recipes of its runs.

The file's `command` says what a run is: `[..., RECIPE.yaml, key=value ..., "${args_no_hyphens}"]`; its `parameters` are
dotted recipe keys. `wandb sweep FILE` and `wandb agent` understand the same file.
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
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from qsam2.errors import UserError
from qsam2.recipe import Recipe, load_recipe
from qsam2.recipe.load import parse_overrides, read_yaml
from qsam2.recipe.section import Section
from qsam2.sweep.parameters import Parameter

Values = dict[str, Any]
"""What a run was given: dotted recipe keys and their values."""

ARGUMENTS = "${args_no_hyphens}"
SCORES = ("J&F", "J", "F", "fidelity", "seconds_per_frame")
SIZES = ("float32", "bfloat16", "packed")
LOSSES = ("mask", "dice", "iou", "class", "distill_imagenet", "distill_masks", "distill_embeddings")


class Metric(Section):
    """What the runs are compared by: a figure of `metrics.json`, as quantized/J&F, or a curve of training, as loss."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None
    """The sweep ends once a run reaches it."""


class Hyperband(Section):
    """Runs that are not among the best 1/eta at a rung are stopped; an iteration is a logged value of the metric.

    The first rung is at min_iter, or at max_iter / eta^s; each next one at eta times as many iterations.
    """

    type: Literal["hyperband"]
    min_iter: PositiveInt | None = None
    max_iter: PositiveInt | None = None
    s: PositiveInt | None = None
    eta: Annotated[int, Field(ge=2)] = 3
    strict: bool = True
    """W&B's; here runs are always held to the strict rule."""

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
    """null: the file's name."""
    description: str = ""
    """Where it says `N s a run`, estimates start from that."""
    project: str | None = None
    entity: str | None = None
    program: str | None = None
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    early_terminate: Hyperband | None = None
    run_cap: PositiveInt | None = None
    """How many runs there are in all; a grid ends by itself."""


@dataclass(frozen=True)
class Sweep:
    """A sweep whose runs are known to be possible. `overrides`, given on the command line, hold for all of them."""

    file: Path
    definition: SweepDefinition
    recipe: Path
    overrides: tuple[str, ...]
    """The command's and the user's, in this order."""

    @property
    def name(self) -> str:
        """Of the sweep and of its runs' group."""
        return self.definition.name or self.file.stem

    @property
    def constants(self) -> Values:
        """Parameters of one value."""
        return {key: each.value for key, each in self.definition.parameters.items() if each.kind == "constant"}

    @property
    def drawn(self) -> dict[str, Parameter]:
        """Parameters that differ between runs."""
        return {key: each for key, each in self.definition.parameters.items() if each.kind != "constant"}

    @property
    def run_seconds(self) -> float | None:
        """What the file says that a run takes."""
        said = re.search(r"(\d+(?:\.\d+)?) s a run", self.definition.description)
        return float(said[1]) if said else None

    @property
    def logs_online(self) -> bool:
        """Whether the runs may log to an account."""
        return self.recipe_of(next(edges(self))).log.wandb in ("auto", "online")

    def arguments(self, values: Values, before: Iterable[str] = (), after: Iterable[str] = ()) -> list[str]:
        """Overrides of one run: those of `before` give way to the file's, those of `after` go before all."""
        return [*before, *self.overrides, *as_text({**self.constants, **values}), *after]

    def recipe_of(self, values: Values) -> Recipe:
        """The recipe of one run; raises UserError that says of which."""
        try:
            return load_recipe(self.recipe, self.arguments(values))
        except UserError as error:
            given = ", ".join(as_text(values)) or "its constants"
            raise UserError(f"sweep {self.file}, {given}: {error}") from error

    def command_of(self, values: Values) -> str:
        """The command that carries out one run by itself."""
        return shlex.join(["qsam2", "train", str(self.recipe), *self.arguments(values)])


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """The sweep of a file, each of whose runs is checked (of ranges: their ends).

    Raises:
        UserError: the file cannot be read or is no sweep, a run's recipe is impossible, no run has the metric.
    """
    path, given = Path(path), tuple(overrides)
    values = read_yaml(path, "sweep", "recipes/sweeps/")
    try:
        definition = SweepDefinition.model_validate(values)
    except ValidationError as error:
        raise UserError(f"sweep {path}: {_describe(error)}") from error
    _check_stopping(path, definition)
    recipe, fixed = _read_command(path, definition)
    for override in given:
        if (key := override.partition("=")[0]) in definition.parameters:
            raise UserError(f"{override}: {key} is a parameter of the sweep {path}; change it there")
    parse_overrides(given)
    sweep = Sweep(path, definition, recipe, (*fixed, *given))
    for values in combinations(sweep) if definition.method == "grid" else edges(sweep):
        _check_metric(sweep, sweep.recipe_of(values))
    return sweep


def combinations(sweep: Sweep) -> Iterator[Values]:
    """All runs of a grid, the last parameter changing first."""
    choices = [each.choices or () for each in sweep.drawn.values()]
    return (dict(zip(sweep.drawn, chosen, strict=True)) for chosen in product(*choices))


def edges(sweep: Sweep) -> Iterator[Values]:
    """Every choice and both ends of every range, beside the first of the others."""
    ends = {key: each.ends for key, each in sweep.drawn.items() if each.ends}
    first = {key: some[0] for key, some in ends.items()}
    yield first
    for key, some in ends.items():
        yield from ({**first, key: value} for value in some[1:])


def as_text(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides of a recipe."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML


def curves(recipe: Recipe) -> list[str]:
    """Names of the metrics that a run reports while it trains."""
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
        instead = f"give one of {', '.join(reported)}, or remove" if reported else "these train nothing: remove"
        raise UserError(
            f"sweep {sweep.file}: early_terminate needs a metric that runs report while they train, and {name!r} is "
            f"known at their end; {instead} early_terminate"
        )


def _check_stopping(path: Path, definition: SweepDefinition) -> None:
    rule = definition.early_terminate
    if rule and rule.min_iter is None and (rule.max_iter is None or rule.s is None):
        raise UserError(f"sweep {path}: early_terminate lacks its first rung: give min_iter, or max_iter and s")
    if definition.method == "grid":
        for key, each in definition.parameters.items():
            if each.choices is None:
                raise UserError(
                    f"sweep {path}: parameters.{key} has the distribution {each.kind}, of which a grid knows no end: "
                    "give values, or method random or bayes"
                )


def _read_command(path: Path, definition: SweepDefinition) -> tuple[Path, list[str]]:
    """The base recipe and the overrides that a file's command holds."""
    words, example = definition.command, f'[..., RECIPE.yaml, key=value, "{ARGUMENTS}"]'
    given = [index for index, word in enumerate(words) if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(given) != 1:
        raise UserError(f"sweep {path}: command names {'no' if not given else 'more than one'} recipe; write {example}")
    if ARGUMENTS not in words:
        raise UserError(f"sweep {path}: command lacks {ARGUMENTS}, by which a run gets its values; write {example}")
    if "${program}" in words and definition.program is None:
        raise UserError(f"sweep {path}: lacks the key 'program', which its command uses; give program: train.py")
    return Path(words[given[0]]), [word for word in words[given[0] + 1 :] if word != ARGUMENTS]


def _describe(error: ValidationError) -> str:
    """The first validation error in one line."""
    first = error.errors()[0]
    *parents, last = (str(part) for part in first["loc"])
    key = ".".join([*parents, last])
    if first["type"] == "extra_forbidden":
        holders: dict[str, type[Section]] = {"metric": Metric, "early_terminate": Hyperband, "parameters": Parameter}
        holder = holders.get(parents[0], SweepDefinition) if parents else SweepDefinition
        near = get_close_matches(last, holder.model_fields, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}: there are {', '.join(holder.model_fields)}{hint}"
    if first["type"] == "missing":
        return f"lacks the key {key!r}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f"{key}: {message}" if first["type"] == "value_error" else f"{key}={first['input']!r}: {message}"
