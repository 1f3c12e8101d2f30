"""Section, the base of everything that a YAML file can hold, and its validation errors in one line each."""

from __future__ import annotations

import contextlib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qsam2.errors import shown

LARGEST = 2**32 - 1
"""Largest magnitude of a number: seeds have 32 bits."""
LONGEST = 4096
"""Characters of a text, a path's among them."""
IMPLAUSIBLE = "implausible"
"""Type of the validation error of a number or text beyond these bounds."""


class Section(BaseModel):
    """Base of all parts of a recipe, sweep or table: typed, checked when made, frozen; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _is_plausible(cls, values: Any) -> Any:
        """Numbers are finite and within bounds, texts can be paths; null is the default of a fixed section."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key in cls.model_fields:
                annotation = cls.model_fields[key].annotation
                if value is None and _is_section(annotation):  # one that cannot be left out
                    continue
                try:
                    _check(value, set(_leaves(annotation)))
                except ValueError as error:  # here, not per field: a discriminator takes no validator
                    raise PydanticCustomError(IMPLAUSIBLE, "{error}", {"key": key, "error": str(error)}) from error
            kept[key] = value
        return kept


def _check(value: Any, allowed: set[Any]) -> None:
    """Raise ValueError if a value is beyond all bounds; `allowed` are the types that its key takes."""
    numbers_only = bool(allowed & {int, float}) and not allowed & {str, bool, Any}
    if isinstance(value, bool):
        if allowed & {int, float} and not allowed & {bool, Any}:
            raise ValueError("should be a number, not true or false")
    elif isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("should be a finite number")
        if abs(value) > LARGEST:
            raise ValueError(f"should be a number from -{LARGEST} to {LARGEST}")
    elif isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"should have at most {LONGEST} characters, not {len(value)}")
        if re.search("[\0\ud800-\udfff]", value):
            raise ValueError("should be text without null characters and halves of surrogate pairs")
        if numbers_only:
            with contextlib.suppress(ValueError):  # no number at all: its own error follows
                value = float(value)
            if isinstance(value, float):
                _check(value, allowed)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check(item, allowed)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    arguments = typing.get_args(annotation)
    if not arguments:
        yield annotation
    elif typing.get_origin(annotation) is not typing.Literal:
        for argument in arguments:
            yield from _leaves(argument)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One text or a list of them."""
Name = Annotated[str, Field(pattern=r"^[\w.\-]*[\w\-][\w.\-]*$", max_length=100)]
"""A name that is also a folder's: not . or .., which are folders already."""
LearningRate = Annotated[float, Field(gt=0, le=1000)]
LearningRateOrNone = Annotated[float, Field(ge=0, le=1000)]
"""0: what it is for stays as it is."""
Tags = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""As `Names`, which may be none."""


def describe(error: ValidationError, schema: type[BaseModel], kind: str) -> str:
    """The first validation error as one line: the key, the value it has, what is allowed.

    `schema` is the type of the whole file, `kind` the word for such a file, as in "a recipe has ...".
    """
    first = error.errors()[0]
    location, holders, annotations = _follow(first["loc"], schema)
    if first["type"] == IMPLAUSIBLE:  # raised by the section, of one of its values
        location, first["input"] = [*location, first["ctx"]["key"]], first["input"][first["ctx"]["key"]]
    key, value = _dotted(location) or kind, shown(first["input"])
    *parents, last = location or [kind]
    if first["type"] == "extra_forbidden":
        valid = list(dict.fromkeys(name for model in holders for name in model.model_fields))
        holder = _dotted(parents) or f"a {kind}"
        return f"unknown {kind} key {shown(key)}: {holder} has {', '.join(valid)}{_meant(location, valid, schema)}"
    if first["type"] == "missing":
        return f"{_dotted(parents) or f'the {kind}'} lacks the key {last!r}"
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):  # raised for several keys together
        return f"{key}: {_message(first)}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        *others, final = (str(_tag(model)) for model in _models(annotations))
        given = first["input"]
        method = f"={shown(given['method'])} is unknown" if "method" in given else " is missing"
        return f"{key}.method{method}: give {', '.join(others)} or {final}"
    if first["type"] in ("model_type", "model_attributes_type"):
        keys = list(dict.fromkeys(name for model in _models(annotations) for name in model.model_fields))
        return f"{key}={value}: set its keys instead, as {key}.{keys[0]}=...: {', '.join(keys)}"
    if first["type"] == "tuple_type":
        return f"{key}={value}: give a list, as [a, b]"
    if first["type"] == "string_pattern_mismatch":
        return f"{key}={value}: give letters, digits, '_', '-' and '.', not dots alone"
    hint = ""
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint = did_you_mean(str(first["input"]), allowed) if len(allowed) > 1 else ""
    return f"{key}={value}: {_message(first)}{hint}"


def did_you_mean(word: str, valid: Iterable[str], cutoff: float = 0.4) -> str:
    """The end of an error message that names the valid word nearest to a wrong one; empty if none is near."""
    near = get_close_matches(word[:100], list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def _meant(location: list[Any], valid: list[str], schema: type[BaseModel]) -> str:
    """`did_you_mean` of a wrong key: one beside it, or the keys of such a name anywhere in the file."""
    word, everywhere = str(location[-1]), sorted(_dotted_keys(schema), key=len)
    if _dotted(location) in everywhere:  # a key of another method
        return ""
    names = [key.rpartition(".")[2] for key in everywhere]
    near = get_close_matches(word[:100], names, n=1, cutoff=0.6)
    if not near or get_close_matches(word[:100], valid, cutoff=0.8 if near[0] == word else 0.6):
        return did_you_mean(word, valid)
    return f"; did you mean {' or '.join([key for key in everywhere if key.rpartition('.')[2] == near[0]][:3])}?"


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of a file that can be written with dots: none within lists and mappings."""
    found: dict[str, None] = {}
    for name, field in schema.model_fields.items():
        found[prefix + name] = None
        for section in _sections(field.annotation):
            found.update(dict.fromkeys(_dotted_keys(section, f"{prefix}{name}.")))
    yield from found


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if _is_section(annotation):
        yield annotation
    elif typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _sections(argument)


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
