"""The definition of a table: one recipe, changed along four axes, scored on several sets; and its runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt

from qsam2.errors import UserError
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.load import find, override, read_recipe
from qsam2.recipe.section import Name, Section, did_you_mean
from qsam2.sweep.definition import MAX_RUNS, Values, as_text, read_definition

FLOAT = "float"
"""Method of the runs that score the float models."""


class Place(NamedTuple):
    """Names of a cell on the four axes."""

    model: str
    method: str
    setting: str
    start: str


class ScoredSet(Section):
    """Data that models are scored on: videos by J&F, stills by mask IoU of box prompts."""

    data: str
    videos: PositiveInt | None = None
    """Number of videos, from the first; null: all."""
    frames: PositiveInt | None = None
    """Number of frames per video, from the first; null: all."""

    @property
    def overrides(self) -> list[str]:
        """Recipe overrides that score on this set."""
        values = {"data.val": self.data, "evaluate.videos": self.videos, "evaluate.frames": self.frames}
        return as_text(values)


class Cross(Section):
    """Runs of all combinations of these names and seeds; null: all names of the axis."""

    models: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    settings: tuple[str, ...] | None = None
    starts: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)


class TableDefinition(Section):
    """Content of a table's file. Values replace those of the keys above them."""

    name: Name
    title: str
    recipe: Path
    """Base recipe of all runs; path relative to the table's file."""
    run_seconds: PositiveFloat
    """Measured duration of a run, for estimates until runs have finished."""
    sets: Annotated[dict[str, ScoredSet], Field(min_length=1)]
    """The first one has to hold videos: it is the `data.val` of the runs."""
    common: Values = {}
    models: Annotated[dict[str, Values], Field(min_length=1)]
    methods: Annotated[dict[str, Values], Field(min_length=1)]
    settings: Annotated[dict[str, Values], Field(min_length=1)]
    starts: Annotated[dict[str, Values], Field(min_length=1)] = {"": {}}
    runs: Annotated[tuple[Cross, ...], Field(min_length=1)]

    def axis(self, axis: str) -> dict[str, Values]:
        """Values of each name of an axis."""
        return getattr(self, f"{axis}s")


@dataclass(frozen=True)
class TableRun:
    """One run of a table."""

    name: str
    """Name of its folder."""
    place: Place
    """The cell that it belongs to, with the runs of other seeds."""
    values: dict[str, Any]
    """Recipe keys that the table sets and that change a score; no defaults, as these differ between versions."""
    recipe: Recipe


def load_table(path: str | Path) -> TableDefinition:
    """Read a table's file; raises UserError if it is no table."""
    path = find(path, "table")
    table = read_definition(path, TableDefinition, "table")
    for cross in table.runs:
        for axis in Place._fields:
            for name in getattr(cross, f"{axis}s") or ():
                if name not in table.axis(axis):
                    there = ", ".join(map(repr, table.axis(axis))) + did_you_mean(name, table.axis(axis), cutoff=0.0)
                    raise UserError(
                        f"table {path}: runs names the {axis} {name!r}, which {axis}s lacks; it has {there}"
                    )
    beside = path.parent / table.recipe
    return table.model_copy(update={"recipe": beside if beside.is_file() else table.recipe})


def table_runs(table: TableDefinition, output: Path, overrides: Iterable[str] = ()) -> list[TableRun]:
    """The runs of a table in its order, without repetitions; `overrides` replace the table's values.

    Raises UserError if a value does not fit the recipe, two runs have one folder, or a name has several float models.
    """
    overrides = list(overrides)
    runs: dict[str, TableRun] = {}
    sizes = [
        [*(len(getattr(cross, f"{axis}s") or table.axis(axis)) for axis in Place._fields), len(cross.seeds)]
        for cross in table.runs
    ]
    if (count := sum(map(math.prod, sizes))) > MAX_RUNS:
        raise UserError(f"table {table.name}: it has {count:,} runs, at most {MAX_RUNS:,} are carried out: name fewer")
    for cross in table.runs:
        axes = (getattr(cross, f"{axis}s") or tuple(table.axis(axis)) for axis in Place._fields)
        for *names, seed in product(*axes, cross.seeds):
            run = _table_run(table, Place(*names), seed, output, overrides)
            if runs.setdefault(run.name, run).place != run.place:
                raise UserError(
                    f"table {table.name}: two runs would share the folder {run.name}; rename one of {tuple(names)}"
                )
    for model in table.models:
        if len({run.recipe.model for run in runs.values() if run.place.model == model}) > 1:
            raise UserError(f"table {table.name}: runs of {model!r} start from several models; set model.* in models")
    return list(runs.values())


def float_runs(runs: Iterable[TableRun]) -> list[TableRun]:
    """One run per float model, which only scores it."""
    floats: dict[str, TableRun] = {}
    for run in runs:
        recipe, name = run.recipe, f"float_{_slug(run.place.model)}"
        kept = {key: getattr(recipe, key) for key in ("model", "data", "trainer", "evaluate")}
        alone = Recipe(name=name, output=recipe.run_folder.parent / name, **kept)
        values = {key: run.values.get(key) for key in ("model", "evaluate")}
        place = Place(run.place.model, FLOAT, "", "")
        floats.setdefault(run.place.model, TableRun(name, place, values, alone))
    return list(floats.values())


def _table_run(table: TableDefinition, place: Place, seed: int, output: Path, overrides: list[str]) -> TableRun:
    name = "_".join(_slug(part) for part in (*place, f"s{seed}") if part)
    layers = [table.common, *(table.axis(axis)[key] for axis, key in zip(Place._fields, place, strict=True))]
    own = {"name": f"{table.name}_{name}", "output": str(output / name), "evaluate.float_cache": str(output / "float")}
    first = next(iter(table.sets.values()))
    try:
        texts = [text for layer in layers for text in as_text(layer)]
        changes = [*texts, *first.overrides, *overrides, f"seed={seed}"]
        values = override(read_recipe(table.recipe, changes), changes)
        recipe = build_recipe(values, as_text(own))
    except UserError as error:
        raise UserError(f"table {table.name}, {', '.join(filter(None, place))}: {error}") from error
    if recipe.quantize is None:
        raise UserError(f"table {table.name}: {table.recipe} quantizes nothing; a table compares quantized models")
    return TableRun(name, place, {key: values[key] for key in values if key not in ("name", "output", "log")}, recipe)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")
