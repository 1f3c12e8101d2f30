"""YAML and `key=value` into a `Recipe`, with errors that name the key, what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qsam2.errors import UserError
from qsam2.recipe.recipe import Recipe
from qsam2.recipe.section import describe

DEBUG_PRESETS: dict[str, dict[str, Any]] = {
    # A few steps of everything: does it run at all?
    "fast": {
        "data": {"num_frames": 2, "max_objects": 1, "num_workers": 0},
        "calibrate": {"stills": 2, "clips": 2, "num_frames": 2},
        "reconstruct": {"iterations": 2, "video": {"iterations": 2}},
        "trainer": {"max_steps": 2, "log_every": 1},
        "evaluate": {"videos": 1, "frames": 4},
        "log": {"wandb": "off"},
    },
    # One clip again and again: can the loss go to zero?
    "overfit": {
        "data": {"train": ["moving_objects:1:train"], "num_frames": 2, "augment": False, "num_workers": 0},
        "trainer": {"max_steps": 100, "log_every": 1},
        "evaluate": {"videos": 1, "frames": 8},
    },
    # Where does the time go?
    "profile": {
        "trainer": {"max_steps": 20, "profiler": "simple"},
        "evaluate": {"videos": 1, "frames": 8},
        "log": {"wandb": "off"},
    },
}

OPTIONAL = ("reconstruct", "video")
"""Parts of a recipe that are null by default, to which presets have values."""

# YAML 1.2's plain scalars: 1e-4 is a number, `off` and 1:30 are text (PyYAML reads 1.1).
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", ["t", "T", "f", "F"]),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text."""


for _kind, (_pattern, _first) in _SCALARS.items():
    for _dialect in (_Loader, _Dumper):
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file, changed by `key=value` overrides with dotted keys, on top of its debug preset.

    Raises:
        UserError: no such file, no YAML, an unknown key or an impossible value.
    """
    return build_recipe(read_yaml(path, "recipe", "recipes/"), overrides)


def read_yaml(path: str | Path, what: str, where: str) -> dict[str, Any]:
    """The `key: value` pairs of a file; errors call it `what` and name the folder `where` qsam2's own are.

    Raises:
        UserError: no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist; {where} holds the ones that come with qsam2")
    try:
        values = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{what} {path} holds no `key: value` pairs")
    return values


def build_recipe(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from plain values, changed by `key=value` overrides (see `load_recipe`)."""
    given = parse_overrides(overrides)
    preset = given.get("debug", values.get("debug"))
    laid = DEBUG_PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    merged = merge(values, _without_absent(laid, merge(values, given)))
    try:
        recipe = Recipe.model_validate(merge(merged, given))
    except ValidationError as error:
        raise UserError(describe(error, Recipe, "recipe")) from error
    return recipe.model_copy(update={"debug": None})  # resolved: a second load must not lay the preset over overrides


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1"]` as `{"a": {"b": 1}}`; values are YAML."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{override!r} is no override; write key=value with a dotted key, as trainer.max_steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: {text!r} is not a valid YAML value") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        given = merge(given, value)
    return given


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` laid over it, mappings merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _without_absent(preset: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A preset without the optional stages that `values` has not: it changes them, it adds none."""
    kept = {key: value for key, value in preset.items() if key not in OPTIONAL or values.get(key) is not None}
    below = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    return {
        key: _without_absent(value, below.get(key, {})) if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, defaults included."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)
