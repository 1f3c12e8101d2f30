"""YAML and `key=value` into a `Recipe`, with errors that name the key, what was given and what is allowed."""

from __future__ import annotations

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
        "calibrate": {"clips": 1, "num_frames": 2},
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


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file, changed by `key=value` overrides with dotted keys, on top of its debug preset.

    Raises:
        UserError: no such file, no YAML, an unknown key or an impossible value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist; recipes/ holds the ones that come with qsam2")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds no `key: value` pairs")
    return build_recipe(values, overrides)


def build_recipe(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from plain values, changed by `key=value` overrides (see `load_recipe`)."""
    given = parse_overrides(overrides)
    preset = given.get("debug", values.get("debug"))
    merged = merge(values, DEBUG_PRESETS.get(preset, {}) if isinstance(preset, str) else {})
    try:
        return Recipe.model_validate(merge(merged, given))
    except ValidationError as error:
        raise UserError(describe(error)) from error


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1"]` as `{"a": {"b": 1}}`; values are YAML."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{override!r} is no override; write key=value with a dotted key, as trainer.max_steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: {text!r} is not a valid YAML value") from error
        if isinstance(value, str):
            value = _number(value)
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


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def describe(error: ValidationError) -> str:
    """The first validation error in one line."""
    first = error.errors()[0]
    location, fields = _walk(first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, unknown = location
        valid = list(dict.fromkeys(name for model in fields for name in model.model_fields))
        near = get_close_matches(str(unknown), valid, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown recipe key {_dotted(location)!r}: {_dotted(parents) or 'a recipe'} has {', '.join(valid)}{hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{_dotted(location)}: {message}" if location else message
    return f"{_dotted(location)}={first['input']!r}: {message}"


def _dotted(location: Iterable[Any]) -> str:
    return ".".join(str(part) for part in location)


def _number(text: str) -> Any:
    # YAML 1.1 reads 1e-4 as a string
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


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
