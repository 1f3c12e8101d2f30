"""Section, the base of everything that a YAML file can hold, and its validation errors in one line each."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class Section(BaseModel):
    """Base of all parts of a recipe, sweep or table: typed, checked when made, frozen; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        """`key=null` resets a section that cannot be left out to its defaults."""
        if not isinstance(values, dict):
            return values
        fixed = {key for key, field in cls.model_fields.items() if _is_section(field.annotation)}
        return {key: value for key, value in values.items() if value is not None or key not in fixed}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One text or a list of them."""
Tags = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""As `Names`, which may be none."""


def describe(error: ValidationError, schema: type[BaseModel], kind: str) -> str:
    """The first validation error as one line: the key, the value it has, what is allowed.

    `schema` is the type of the whole file, `kind` the word for such a file, as in "a recipe has ...".
    """
    first = error.errors()[0]
    location, holders, annotations = _follow(first["loc"], schema)
    key, value = _dotted(location) or kind, first["input"]
    *parents, last = location or [kind]
    if first["type"] == "extra_forbidden":
        valid = list(dict.fromkeys(name for model in holders for name in model.model_fields))
        holder = _dotted(parents) or f"a {kind}"
        return f"unknown {kind} key {key!r}: {holder} has {', '.join(valid)}{did_you_mean(str(last), valid)}"
    if first["type"] == "missing":
        return f"{_dotted(parents) or f'the {kind}'} lacks the key {last!r}"
    if first["type"] == "value_error" and isinstance(value, Mapping):  # raised for several keys together
        return f"{key}: {_message(first)}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        *others, final = (str(_tag(model)) for model in _models(annotations))
        method = f"={value['method']!r} is unknown" if "method" in value else " is missing"
        return f"{key}.method{method}: give {', '.join(others)} or {final}"
    if first["type"] in ("model_type", "model_attributes_type"):
        keys = list(dict.fromkeys(name for model in _models(annotations) for name in model.model_fields))
        return f"{key}={value!r}: set its keys instead, as {key}.{keys[0]}=...: {', '.join(keys)}"
    if first["type"] == "tuple_type":
        return f"{key}={value!r}: give a list, as [a, b]"
    hint = ""
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint = did_you_mean(str(value), allowed) if len(allowed) > 1 else ""
    return f"{key}={value!r}: {_message(first)}{hint}"


def did_you_mean(word: str, valid: Iterable[str], cutoff: float = 0.4) -> str:
    """The end of an error message that names the valid word nearest to a wrong one; empty if none is near."""
    near = get_close_matches(word, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def _message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ").replace("Input should", "should")


def _dotted(location: Iterable[Any]) -> str:
    return ".".join(str(part) for part in location)


def _follow(location: Iterable[Any], schema: type[BaseModel]) -> tuple[list[Any], list[type[BaseModel]], list[Any]]:
    """A pydantic location without the tags of unions, the models that hold its last key, and that key's types."""
    keys: list[Any] = []
    types: list[Any] = [schema]
    holders: list[type[BaseModel]] = []
    for part in location:
        models = _models(types)
        tagged = [model for model in models if _tag(model) == part]
        if tagged and not any(part in model.model_fields for model in models):
            types = tagged
            continue
        values = [typing.get_args(type_)[1] for type_ in types if typing.get_origin(type_) is dict]
        if isinstance(part, str) and not models and not values:
            continue  # the tag of a union of plain types
        keys.append(part)
        holders = models
        if isinstance(part, str):
            fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            types = [inner for type_ in fields + values for inner in _members(type_)]
    return keys, holders, types


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _members(annotation: Any) -> list[Any]:
    """Models and mappings of an annotation; unions, tuples and annotated types are opened."""
    if typing.get_origin(annotation) is dict or _is_section(annotation):
        return [annotation]
    return [member for argument in typing.get_args(annotation) for member in _members(argument)]


def _models(types: Iterable[Any]) -> list[type[BaseModel]]:
    return [type_ for type_ in types if typing.get_origin(type_) is not dict]


def _tag(model: type[BaseModel]) -> Any:
    method = model.model_fields.get("method")
    return method.default if method else None
