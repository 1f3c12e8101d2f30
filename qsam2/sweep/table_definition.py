"""A table as a YAML file defines it: what is compared, at which settings, on what; and the runs that follow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from qsam2.errors import UserError
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.load import merge, parse_overrides, read_yaml
from qsam2.recipe.section import Section

Overrides = dict[str, Any]
"""Values of dotted recipe keys."""

FLOAT = "float"
"""Method of the runs that score the float models."""

AXES = ("model", "method", "setting", "start")

Place = tuple[str, str, str, str]
"""A cell's names on the axes."""


class ScoredSet(Section):
    """What models are scored on: J&F where it holds videos, mask IoU of box prompts where it holds stills."""

    data: str
    videos: PositiveInt | None = None
    """The first so many only."""
    frames: PositiveInt | None = None
    """The first so many of each video only."""

    @property
    def overrides(self) -> list[str]:
        """The recipe keys that score on it."""
        values = {"data.val": self.data, "evaluate.videos": self.videos, "evaluate.frames": self.frames}
        return _as_text(values)


class Cross(Section):
    """Runs of every combination of these names and seeds; null: all names of the axis."""

    models: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    settings: tuple[str, ...] | None = None
    starts: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)


class TableDefinition(Section):
    """One recipe, changed along four axes. Overrides further down go before those above."""

    name: Annotated[str, Field(pattern=r"^[\w\-]+$")]
    title: str
    recipe: Path
    """Of all runs; relative to the table's file."""
    run_seconds: PositiveFloat
    """What a run takes, measured, for the estimate; once runs are finished, they tell."""
    sets: Annotated[dict[str, ScoredSet], Field(min_length=1)]
    """The first must be videos: runs score themselves on it."""
    common: Overrides = {}
    models: Annotated[dict[str, Overrides], Field(min_length=1)]
    methods: Annotated[dict[str, Overrides], Field(min_length=1)]
    settings: Annotated[dict[str, Overrides], Field(min_length=1)]
    starts: Annotated[dict[str, Overrides], Field(min_length=1)] = {"": {}}
    runs: Annotated[tuple[Cross, ...], Field(min_length=1)]

    def axis(self, axis: str) -> dict[str, Overrides]:
        """The overrides of an axis, by name."""
        return getattr(self, f"{axis}s")


@dataclass(frozen=True)
class TableRun:
    """One run of a table; its name is that of its folder."""

    name: str
    model: str
    method: str
    setting: str
    start: str
    values: dict[str, Any]
    """What of the recipe was given and changes a score; no defaults, which differ between versions of qsam2."""
    recipe: Recipe

    @property
    def place(self) -> Place:
        """Where its scores stand, with those of other seeds."""
        return self.model, self.method, self.setting, self.start


def load_table(path: str | Path) -> TableDefinition:
    """A table's definition; raises UserError where the file cannot be read or is no table."""
    path = Path(path)
    values = read_yaml(path, "table", "recipes/tables/")
    try:
        table = TableDefinition.model_validate(values)
    except ValidationError as error:
        raise UserError(f"table {path}: {_describe(error)}") from error
    for cross in table.runs:
        for axis in AXES:
            for name in getattr(cross, f"{axis}s") or ():
                if name not in table.axis(axis):
                    near = get_close_matches(name, table.axis(axis), n=1, cutoff=0.0)[0]
                    raise UserError(
                        f"table {path}: runs names the {axis} {name!r}, which {axis}s lacks; it has "
                        f"{', '.join(map(repr, table.axis(axis)))}; did you mean {near!r}?"
                    )
    return table.model_copy(update={"recipe": path.parent / table.recipe})


def table_runs(table: TableDefinition, output: Path, overrides: Iterable[str] = ()) -> list[TableRun]:
    """The runs of a table in its order, each once; `overrides` go before all others.

    Raises:
        UserError: an override of the table does not fit the recipe, two runs would share a folder, or the float models
            of one name differ.
    """
    overrides = list(overrides)
    runs: dict[str, TableRun] = {}
    for names, seed in _combinations(table):
        run = _table_run(table, names, seed, output, overrides)
        other = runs.setdefault(run.name, run)
        if other.place != names:
            raise UserError(f"table {table.name}: two runs would share the folder {run.name}; rename one of {names}")
    for model in table.models:
        if len({run.recipe.model for run in runs.values() if run.model == model}) > 1:
            raise UserError(f"table {table.name}: runs of {model!r} start from several models; set model.* in models")
    return list(runs.values())


def float_runs(runs: Iterable[TableRun]) -> list[TableRun]:
    """A run for every float model that these start from: nothing but its scores."""
    floats: dict[str, TableRun] = {}
    for run in runs:
        recipe, name = run.recipe, f"float_{_slug(run.model)}"
        alone = Recipe(
            name=name,
            output=recipe.run_folder.parent / name,
            model=recipe.model,
            data=recipe.data,
            trainer=recipe.trainer,
            evaluate=recipe.evaluate,
        )
        values = {key: run.values.get(key) for key in ("model", "evaluate")}
        floats.setdefault(run.model, TableRun(name, run.model, FLOAT, "", "", values, alone))
    return list(floats.values())


def _combinations(table: TableDefinition) -> Iterator[tuple[Place, int]]:
    for cross in table.runs:
        models, methods, settings, starts = (getattr(cross, f"{axis}s") or tuple(table.axis(axis)) for axis in AXES)
        for *names, seed in product(models, methods, settings, starts, cross.seeds):
            yield (names[0], names[1], names[2], names[3]), seed


def _table_run(table: TableDefinition, names: Place, seed: int, output: Path, overrides: list[str]) -> TableRun:
    name = "_".join(_slug(part) for part in (*names, f"s{seed}") if part)
    chosen = [table.common, *(table.axis(axis)[given] for axis, given in zip(AXES, names, strict=True))]
    own = {"name": f"{table.name}_{name}", "output": str(output / name), "evaluate.float_cache": str(output / "float")}
    first = next(iter(table.sets.values()))
    try:
        texts = [text for values in chosen for text in _as_text(values)]
        given = parse_overrides([*texts, *first.overrides, *overrides, f"seed={seed}"])
        values = merge(read_yaml(table.recipe, "recipe", "recipes/"), given)
        recipe = build_recipe(values, _as_text(own))
    except UserError as error:
        raise UserError(f"table {table.name}, {', '.join(part for part in names if part)}: {error}") from error
    if recipe.quantize is None:
        raise UserError(f"table {table.name}: {table.recipe} quantizes nothing; a table compares quantized models")
    model, method, setting, start = names
    values = {key: value for key, value in values.items() if key not in ("name", "output", "log")}
    return TableRun(name, model, method, setting, start, values, recipe)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def _as_text(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, last = first["loc"]
        sections: dict[str, type[Section]] = {"sets": ScoredSet, "runs": Cross}
        holder = sections.get(str(parents[0]) if parents else "", TableDefinition)
        near = get_close_matches(str(last), holder.model_fields, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}: there are {', '.join(holder.model_fields)}{hint}"
    if first["type"] == "missing":
        return f"lacks the key {key!r}"
    return f"{key}={first['input']!r}: {first['msg']}"
