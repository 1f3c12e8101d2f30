"""YAML and `key=value` into a `Recipe`, with errors that name the key, what was given and what is allowed."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qsam2.errors import UserError
from qsam2.recipe.recipe import Recipe

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
        raise UserError(describe(error)) from error
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


def describe(error: ValidationError) -> str:
    """The first validation error in one line."""
    first = error.errors()[0]
    location, fields = _walk(first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, unknown = location
        valid = list(dict.fromkeys(name for model in fields for name in model.model_fields))
        near = get_close_matches(str(unknown), valid, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        holder = _dotted(parents) or "a recipe"
        return f"unknown recipe key {_dotted(location)!r}: {holder} has {', '.join(valid)}{hint}"
    key, given = _dotted(location) or "recipe", first["input"]
    if first["type"] == "value_error" and isinstance(given, Mapping):  # what several keys say together
        return f"{key}: {_ours(first)}"
    if first["type"] == "missing":
        *parents, lacking = location
        return f"{_dotted(parents)} lacks the key {lacking!r}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        *others, last = (str(_tag(model)) for model in _walk((*first["loc"], ""))[1])
        method = f"={given['method']!r} is unknown" if "method" in given else " is missing"
        return f"{key}.method{method}: give {', '.join(others)} or {last}"
    if first["type"] in ("model_type", "model_attributes_type"):
        keys = dict.fromkeys(name for model in _walk((*first["loc"], ""))[1] for name in model.model_fields)
        return f"{key}={given!r}: set its keys instead, as {key}.{next(iter(keys))}=...: {', '.join(keys)}"
    if first["type"] == "tuple_type":
        return f"{key}={given!r}: give a list, as [a, b]"
    return f"{key}={given!r}: {_ours(first)}"


def _ours(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ").replace("Input should", "should")


def _dotted(location: Iterable[Any]) -> str:
    return ".".join(str(part) for part in location)


def _walk(location: Iterable[Any]) -> tuple[list[Any], list[type[BaseModel]]]:
    """A pydantic location without the tags of unions, and the models that hold its last key."""
    kept: list[Any] = []
    models: list[type[BaseModel]] = [Recipe]
    holders = models
    for part in location:
        tagged = [model for model in models if _tag(model) == part]
        if tagged and not any(part in model.model_fields for model in models):
            models = tagged
            continue
        if not models and isinstance(part, str):
            continue  # the tag of a union of plain types
        kept.append(part)
        holders = models
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [inner for field in fields for inner in _models(field.annotation)]
    return kept, holders


def _tag(model: type[BaseModel]) -> Any:
    method = model.model_fields.get("method")
    return method.default if method else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.GenericAlias) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models(argument)]
    return []
