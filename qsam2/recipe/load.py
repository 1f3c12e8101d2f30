"""Recipe files, found by path or shipped name, and `key=value` overrides into a `Recipe`: bases, sizes, presets."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from qsam2.errors import UserError, short, shortened, shown
from qsam2.recipe.recipe import ModelRecipe, Recipe, Size
from qsam2.recipe.section import describe, did_you_mean

Kind = Literal["recipe", "sweep", "table"]

SHIPPED = Path(__file__).parents[1] / "recipes"
"""Folder of the shipped files; in a checkout a link to its `recipes/`."""
FOLDERS: dict[Kind, Path] = {"recipe": SHIPPED, "sweep": SHIPPED / "sweeps", "table": SHIPPED / "tables"}

SIZES: tuple[str, ...] = get_args(Size)

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

# YAML 1.2's plain scalars: 1e-4 is a number, `off` and 1:30 are text (PyYAML reads 1.1).
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 2**19, 50_000, 40, 400
"""Bounds of a YAML file: its size, its values with each alias written out, their nesting, letters of a number."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} values")
        return super().compose_node(parent, index)

    def get_single_data(self) -> Any:
        """The document as plain values, after it was checked: see `parse_yaml`."""
        document = self.get_single_node()
        if document is None:
            return None
        _check_nodes(document)
        return self.construct_document(document)


def _check_nodes(document: yaml.Node) -> None:
    """Raise ValueError where a document repeats a key, or would become more than a file of this size holds."""
    nodes, count = [(document, 0)], 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise ValueError("it is nested too deeply, or its aliases make too much of it")
        if isinstance(node, yaml.ScalarNode):
            _check_text(node)
            if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
                raise ValueError(f"line {node.start_mark.line + 1} has a number of {len(node.value)} digits")
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(child, depth + 1) for child in node.value]
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, child in node.value:
                line = f"line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                    raise ValueError(f"{line} has a key that is no text")
                _check_text(key)
                if key.value in keys:
                    raise ValueError(f"{line} gives {shown(key.value)} a second time: remove one")
                keys.add(key.value)
                nodes.append((child, depth + 1))


def _check_text(node: yaml.ScalarNode) -> None:
    if re.search("[\0\ud800-\udfff]", node.value):
        raise ValueError(f"line {node.start_mark.line + 1} has a null character or half of a surrogate pair")


def parse_yaml(text: str | bytes) -> Any:
    """Plain values of YAML 1.2 text: mappings, lists, texts, numbers, true, false, null.

    Raises:
        ValueError: it cannot be read, repeats a key, or is far larger than it looks; one line says which.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text)} bytes or more, at most {MAX_BYTES} are read")
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error  # PyYAML's constructors raise more than its own


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text."""


for _kind, _pattern in _SCALARS.items():
    for _dialect in (_Loader, _Dumper):
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)


def shipped(kind: Kind) -> dict[str, Path]:
    """{name: file} of all shipped files of a kind, sorted; nano's own recipes are named nano/NAME."""
    folder = FOLDERS[kind]
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("nano/*.yaml"))]
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find(file: str | Path, kind: Kind) -> Path:
    """An existing file, else the shipped one of this name (`qat_w4a4`) or path (`recipes/qat_w4a4.yaml`).

    Raises:
        UserError: there is neither; the message names the nearest.
    """
    path = Path(file)
    if os.path.isfile(path):  # False, too, of what no path can be
        return path
    kinds: tuple[Kind, ...] = ("recipe",) if kind == "recipe" else ("sweep", "table")  # one command takes both
    names = {name: file for kind in kinds for name, file in shipped(kind).items()}
    paths = {f"recipes/{file.relative_to(SHIPPED).with_suffix('').as_posix()}": file for file in names.values()}
    name = path.as_posix().removesuffix(".yaml")
    if found := names.get(name) or paths.get(name):
        return found
    hint = did_you_mean(path.stem, names, cutoff=0.6)
    raise UserError(f"{kind} {file} does not exist: give a file, or a name that `qsam2 recipes` lists{hint}")


def load_recipe(file: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file, or the shipped one of this name, changed by `key=value` overrides.

    From the bottom up: the recipe that `base` names, the file, its `sizes` for the model's size, the debug preset, the
    overrides.

    Raises:
        UserError: no such file, no YAML, an unknown key or an impossible value.
    """
    overrides = list(overrides)
    return build_recipe(read_recipe(file, overrides), overrides)


def build_recipe(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from plain values, changed by `key=value` overrides (see `load_recipe`)."""
    overrides = list(overrides)
    values = _resolve([values], overrides, "recipe")
    try:
        recipe = Recipe.model_validate(override(merge(values, _preset(override(values, overrides))), overrides))
    except ValidationError as error:
        raise UserError(describe(error, Recipe, "recipe")) from error
    return recipe.model_copy(update={"debug": None})  # resolved: a second load must not lay the preset over overrides


def read_recipe(file: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Values of a recipe file, its `base` and `sizes` resolved; the overrides are not applied, but may set the size.

    Raises:
        UserError: see `read_yaml`; `base` or `sizes` cannot be used.
    """
    layers: list[dict[str, Any]] = []
    path, chain = find(file, "recipe"), [str(file)]
    seen = [path.resolve()]
    while True:
        layers.insert(0, read_yaml(path, "recipe"))
        base = layers[0].pop("base", None)
        if base is None:
            return _resolve(layers, overrides, f"recipe {file}")
        beside, chain = path.parent / str(base), [*chain, str(base)]
        try:
            path = beside if os.path.isfile(beside) else find(str(base), "recipe")
        except UserError as error:
            raise UserError(f"recipe {path}: base: {error}") from error
        if path.resolve() in seen:
            raise UserError(f"recipe {file}: base leads back to itself ({' -> '.join(chain)}): remove one base")
        seen.append(path.resolve())


def read_yaml(file: str | Path, kind: Kind) -> dict[str, Any]:
    """The `key: value` pairs of a file, or of the shipped one of this name.

    Raises:
        UserError: no such file, or it holds something else.
    """
    path = find(file, kind)
    try:
        with path.open("rb") as opened:
            values = parse_yaml(opened.read(MAX_BYTES + 1))
    except OSError as error:
        raise UserError(f"{kind} {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{kind} {file} is not valid YAML: {short(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{kind} {file} holds no `key: value` pairs")
    return values


def _resolve(layers: Sequence[Mapping[str, Any]], overrides: Iterable[str], what: str) -> dict[str, Any]:
    """Layers of values, the lowest first, as one; each layer's `sizes` lie directly over it."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer)
    size = _size(override(values, overrides)) or ModelRecipe().size  # `model={}` resets it
    values = {}
    for layer in layers:
        values = merge(values, {key: value for key, value in layer.items() if key != "sizes"})
        sizes = layer.get("sizes") or {}
        if not isinstance(sizes, Mapping):
            raise UserError(
                f"{what}: sizes={shown(sizes)}: give a mapping from sizes to values, as sizes: {{nano*: {{...}}}}"
            )
        for pattern, part in sizes.items():
            key = f"{what}: sizes.{pattern}"
            if not fnmatch.filter(SIZES, str(pattern)):
                hint = did_you_mean(str(pattern), SIZES)
                raise UserError(f"{key} matches no size: there are {', '.join(SIZES)}{hint}")
            if not isinstance(part, Mapping) or _size(part) is not None:
                raise UserError(f"{key}={shown(part)}: give a mapping of recipe keys other than model.size")
            if fnmatch.fnmatchcase(str(size), str(pattern)):
                values = merge(values, part)
    return values


def _size(values: Mapping[str, Any]) -> Any:
    model = values.get("model")
    return model.get("size") if isinstance(model, Mapping) else None


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Values changed by `key=value` overrides, one after another: `a.b=1`, `a={}` (defaults), `a=null` (none).

    Raises:
        UserError: an override is not written so, or its value is not YAML.
    """
    changed = dict(values)
    for text in overrides:
        key, equals, written = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(
                f"{shown(text)} is no override; write key=value with a dotted key, as trainer.max_steps=100"
            )
        try:
            value = parse_yaml(written)
        except ValueError as error:
            reason = f"{shortened(repr(written), 60)} is not a valid YAML value ({short(error)})"
            raise UserError(f"{shown(text)}: {reason}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        changed = merge(changed, value)
    return changed


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1"]` as `{"a": {"b": 1}}`, the last override of a key winning; raises UserError as `override`."""
    return override({}, overrides)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` laid over it: mappings merged key by key, an empty one replaces.

    A text below a mapping is its `method`: `weights: frobenius` and `weights.rhos=0.1` go together.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping):
            old = {"method": old}
        joins = isinstance(old, Mapping) and isinstance(value, Mapping) and len(value) > 0
        merged[key] = merge(old, value) if joins else value  # type: ignore[arg-type]
    return merged


def _preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The debug preset of a recipe's values. It changes the stages that are null by default, it adds none."""
    name, stage = values.get("debug"), values.get("reconstruct")
    preset = dict(DEBUG_PRESETS.get(name, {})) if isinstance(name, str) else {}
    if not isinstance(stage, Mapping):
        preset.pop("reconstruct", None)
    elif "reconstruct" in preset and stage.get("video") is None:
        preset["reconstruct"] = {key: value for key, value in preset["reconstruct"].items() if key != "video"}
    train = values.get("train")
    stages = train.get("stages") if isinstance(train, Mapping) else None
    if "trainer" in preset and isinstance(stages, list) and all(isinstance(each, Mapping) for each in stages):
        preset["train"] = {"stages": [{key: value for key, value in each.items() if key != "steps"} for each in stages]}
    return preset


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, defaults included."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)
