"""The reference of all recipe keys as Markdown, generated from the schema: type, default, meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from qsam2.recipe.load import DEBUG_PRESETS
from qsam2.recipe.quantizer_specs import QuantizerSpec, methods
from qsam2.recipe.recipe import Recipe

Schema = dict[str, Any]
QUANTIZERS = ("quantize.weights", "quantize.activations")

INTRODUCTION = """# Recipe keys

Every key of a recipe can stand in its YAML file and be overridden on the command line: `train.lr=1e-4`. `key={}` resets
a section to its defaults, `key=null` leaves it out. The tables are generated from the schema (`qsam2/recipe/`).

Two keys stand in files alone and are resolved when the file is read:

| key | meaning |
|---|---|
| `base` | Recipe that the file lies over: a path relative to the file, or a name that `qsam2 recipes` lists. |
| `sizes` | Values by model size, laid over those of the file, as `sizes: {nano*: {train: {lr: 1e-4}}}`. |"""


def reference() -> str:
    """Markdown with one table per section of a recipe, in the order of the schema."""
    root = Recipe.model_json_schema()
    parts = [INTRODUCTION, *_sections("", root, root["$defs"]), _presets()]
    return "\n\n".join(parts) + "\n"


def _sections(path: str, section: Schema, definitions: Schema, heading: str = "") -> Iterator[str]:
    yield heading or f"## {path or 'Top level'}"
    yield section["description"]
    yield _table(section, definitions, path)
    if path == "quantize":
        yield from _methods()
    for key, property_ in section["properties"].items():
        inner, names = f"{path}.{key}".lstrip("."), _referenced(property_)
        if inner in QUANTIZERS:
            continue
        if len(names) > 1:
            yield f"## {inner}"
        for name in names:
            definition = definitions[name]
            method = f"### method={definition['properties']['method']['const']}" if len(names) > 1 else ""
            yield from _sections(inner, definition, definitions, method)


def _methods() -> Iterator[str]:
    common = QuantizerSpec.model_json_schema()
    yield f"## {' and '.join(QUANTIZERS)}"
    yield "Keys of every method:"
    yield _table(common, {})
    for method, spec in methods().items():
        schema = spec.model_json_schema()
        properties = {key: value for key, value in schema["properties"].items() if key != "method"}
        fixed = [f"{key}={_plain(value['const'])}" for key, value in properties.items() if "const" in value]
        own = {key: _inherited(spec, key, value) for key, value in properties.items() if "const" not in value}
        changed = {key: value for key, value in own.items() if not _same(value, common["properties"].get(key))}
        yield f"### method={method}"
        sentences = [schema["description"], f"For {' and '.join(f'{role}s' for role in spec.roles)}."]
        yield " ".join([*sentences, *([f"Fixed: `{', '.join(fixed)}`."] if fixed else [])])
        if changed:
            yield _table({"properties": changed}, {})


def _inherited(spec: type[QuantizerSpec], key: str, property_: Schema) -> Schema:
    """A key of a method, with the description of a base if the method gives it none of its own."""
    bases = [base for base in spec.__mro__ if issubclass(base, BaseModel)]
    fields = [base.model_fields[key] for base in bases if key in base.model_fields]
    return {"description": next((field.description for field in fields if field.description), None), **property_}


def _same(property_: Schema, common: Schema | None) -> bool:
    return common is not None and all(property_.get(key) == value for key, value in common.items())


def _presets() -> str:
    rows = [f"| `debug={name}` | {_code(values)} |" for name, values in DEBUG_PRESETS.items()]
    return "\n".join(["## Values of debug", "", "| | values |", "|---|---|", *rows])


def _table(section: Schema, definitions: Schema, path: str = "") -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, property_ in section["properties"].items():
        default = property_.get("default")
        inner = f"{path}.{key}".lstrip(".")
        if _referenced(property_) and default is not None and not isinstance(default, list):
            shown = f"see [{inner}](#{_anchor(inner)})"
        else:
            shown = _code(default) if "default" in property_ else "required"
        described = property_ if "description" in property_ else definitions[_referenced(property_)[0]]
        meaning = " ".join(described["description"].split()).replace("|", r"\|")
        rows.append(f"| `{key}` | {_type(property_, inner)} | {shown} | {meaning} |")
    return "\n".join(rows)


def _type(schema: Schema, path: str) -> str:
    """The type of a key in words."""
    if path in QUANTIZERS:
        return f"[quantizer](#{_anchor(' and '.join(QUANTIZERS))}) or null"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(member, path) for member in schema[union]))
    if "$ref" in schema:
        return f"[section](#{_anchor(path)})"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'], path)}"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    word = "path" if schema.get("format") == "path" else words.get(schema.get("type", ""), "null")
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return f"{word} {', '.join(limits)}".strip()


def _referenced(schema: Schema) -> list[str]:
    """Names of the sections that a key can hold."""
    if "$ref" in schema:
        return [schema["$ref"].rsplit("/", 1)[1]]
    members = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *([schema["items"]] if "items" in schema else [])]
    return [name for member in members for name in _referenced(member)]


def _code(value: Any) -> str:
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()


def _anchor(heading: str) -> str:
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")
