"""A recipe that leaves its machine, in a card, a report or a model's header, and one that came from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from qsam2.recipe.source import parts_of

PATHS = ("output", "data.root", "evaluate.float_cache")
"""Keys that name folders of the machine that a run was made on."""
FILES = ("model.checkpoint", "quantize.allocate.sensitivity")
DEVICES = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto"}
"""Keys of `trainer` that say what the machine of a run computes on, with their defaults."""
SOURCES = ("data.train", "data.val", "evaluate.stills")
"""Keys of data, written KIND[:ROOT[:SPLIT]]."""


def portable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe for other machines: of an absolute path its last part, no folders for output and caches."""
    return _changed(values, lambda root: PurePath(root).name if root.startswith(("/", "~")) else root)


def without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe that a model's file holds: what it says is data, and names no place on this machine.

    Sources keep their kind and split, generated ones their number of videos; a checkpoint keeps its name. Devices are
    those of this machine.
    """
    changed = _changed(values, lambda root: "")
    for key, default in DEVICES.items():
        changed = _replaced(changed, ["trainer", key], lambda _: default)  # noqa: B023  # called at once
    return changed


def _changed(values: Mapping[str, Any], change_root: Callable[[str], str]) -> dict[str, Any]:
    def source(spec: Any) -> Any:
        kind, root, split = parts_of(spec) if isinstance(spec, str) else (spec, "", "")
        if kind == "moving_objects" or not (root or split):
            return spec
        return f"{kind}:{change_root(root)}:{split}".rstrip(":")

    changed = dict(values)
    for key in PATHS:
        changed = _replaced(changed, key.split("."), lambda _: None)
    for key in FILES:
        changed = _replaced(
            changed, key.split("."), lambda file: PurePath(file).name if isinstance(file, str) else file
        )
    for key in SOURCES:
        changed = _replaced(
            changed, key.split("."), lambda spec: [*map(source, spec)] if isinstance(spec, list) else source(spec)
        )
    return changed


def _replaced(values: Any, keys: list[str], change: Callable[[Any], Any]) -> Any:
    """A copy of nested values with another value at the keys, if there is one."""
    key, *others = keys
    if not isinstance(values, dict) or values.get(key) is None:
        return values
    return {**values, key: _replaced(values[key], others, change) if others else change(values[key])}
