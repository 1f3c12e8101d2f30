"""A recipe that leaves its machine, in a card, a report or a model's header, and one that came from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

PATHS = ("output", "data.root", "evaluate.float_cache")
"""Keys that name folders of the machine that a run was made on."""
FILES = ("model.checkpoint", "quantize.allocate.sensitivity")
SOURCES = ("data.train", "data.val", "evaluate.stills")
"""Keys of data, written KIND[:ROOT[:SPLIT]]."""


def portable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe for other machines: of an absolute path its last part, no folders for output and caches."""
    return _changed(values, lambda root: PurePath(root).name if root.startswith(("/", "~")) else root)


def without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe that a model's file holds: what it says is data, and names no place on this machine.

    Sources keep their kind and split, generated ones their number of videos; a checkpoint keeps its name.
    """
    return _changed(values, lambda root: "")


def _changed(values: Mapping[str, Any], root: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(values))

    def source(spec: Any) -> Any:
        kind, colon, rest = spec.partition(":") if isinstance(spec, str) else (spec, "", "")
        if not colon or kind == "moving_objects":
            return spec
        place, colon, split = rest.partition(":")
        return f"{kind}:{root(place)}{colon}{split}".removesuffix(":")

    for key in PATHS:
        _change(changed, key, lambda _: None)
    for key in FILES:
        _change(changed, key, lambda path: PurePath(path).name if isinstance(path, str) else path)
    for key in SOURCES:
        _change(changed, key, lambda spec: [source(each) for each in spec] if isinstance(spec, list) else source(spec))
    return changed


def _change(values: dict[str, Any], key: str, change: Any) -> None:
    """Replace the value of a dotted key, if there is one."""
    *parents, last = key.split(".")
    holder: Any = values
    for parent in parents:
        holder = holder.get(parent) if isinstance(holder, dict) else None
    if isinstance(holder, dict) and holder.get(last) is not None:
        holder[last] = change(holder[last])
