"""Videos named by one string, ``KIND[:ROOT[:SPLIT]]``, as recipes and the command line give them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qsam2.data.clips import Source
from qsam2.data.davis import davis_videos
from qsam2.data.sav import sav_videos
from qsam2.data.stills import coco_stills, instance_png_stills, sa1b_stills, yolo_stills
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.recipe.recipe import Recipe

_READERS: dict[str, Callable[[Path, str], Sequence[Video]]] = {
    "davis": davis_videos,
    "sav": sav_videos,
    "coco": coco_stills,
    "sa1b": lambda root, split: sa1b_stills(root),
    "yolo": yolo_stills,
    "instance_png": lambda root, split: instance_png_stills(root),
}
KINDS = ("moving_objects", *_READERS)
MOVING_OBJECTS_COUNT = {"train": 10_000, "val": 20, "test": 20}


def open_videos(spec: str, *, root: str | Path | None = None, split: str = "val") -> list[Video]:
    """The videos that `spec` names; `root` and `split` stand in for parts that it leaves out.

    ``davis:/data/DAVIS:val``, ``davis`` with `root`, ``moving_objects[:COUNT[:SPLIT]]`` (20 videos, 10000 of train).
    A relative root that does not exist is also looked for in $QSAM2_DATA. Raises UserError naming what is unknown,
    missing or malformed.
    """
    kind, *parts = spec.split(":")
    if kind not in KINDS:
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise UserError(f"data {spec!r}: {kind!r} is no kind of data; did you mean {nearest!r}? It is {_one_of(KINDS)}")
    if len(parts) > 2:
        raise UserError(f"data {spec!r}: has too many parts; write {_form(kind)}")
    place, split = (parts[0] if parts else ""), (parts[1] if len(parts) == 2 and parts[1] else split)
    if kind == "moving_objects":
        return list(moving_objects(split, _count(spec, place, split)))  # type: ignore[arg-type]
    return list(_READERS[kind](_folder(spec, kind, place or root), split))


def is_generated(spec: str) -> bool:
    """Whether `spec` names generated videos."""
    return spec.split(":")[0] == "moving_objects"


def _count(spec: str, given: str, split: str) -> int:
    if not given:
        return MOVING_OBJECTS_COUNT.get(split, 1)
    if not given.isdigit():
        raise UserError(f"data {spec!r}: the number of videos is {given!r}; write {_form('moving_objects')}")
    return int(given)


def _folder(spec: str, kind: str, given: str | Path | None) -> Path:
    if not given:
        raise UserError(f"data {spec!r}: needs the dataset's folder; write {_form(kind)} or give data.root=FOLDER")
    shared = os.environ.get("QSAM2_DATA")
    places = [Path(given).expanduser()]
    if shared and not places[0].is_absolute():
        places.append(Path(shared) / given)
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        looked = " nor ".join(str(place) for place in places)
        raise UserError(
            f"data {spec!r}: there is no folder {looked}; give the dataset's folder as data.root=FOLDER or "
            f"{_form(kind)}, or set QSAM2_DATA to the folder that holds {given}"
        )
    return found


def _form(kind: str) -> str:
    return "moving_objects[:COUNT[:SPLIT]]" if kind == "moving_objects" else f"{kind}:FOLDER[:SPLIT]"


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def open_val(recipe: Recipe) -> list[Video]:
    """The videos that the recipe scores on."""
    return open_videos(recipe.data.scored, root=recipe.data.root, split="val")[: recipe.evaluate.videos]


def open_stills(recipe: Recipe) -> list[Video]:
    """The images on which masks from boxes are scored; none where the recipe names none."""
    spec = recipe.evaluate.stills
    if spec is None:
        return []
    stills = list(open_videos(spec, root=recipe.data.root, split="val"))
    if any(len(still) > 1 for still in stills):
        raise UserError(f"evaluate.stills={spec}: holds videos; name images, such as coco:FOLDER, or null")
    return stills


def open_train(recipe: Recipe) -> list[Source]:
    """The recipe's train sources with their weights; none where it neither calibrates nor trains."""
    if recipe.quantize is None and recipe.train is None:
        return []
    data = recipe.data
    weights = data.weights or (1.0,) * len(data.train)
    return [
        Source(
            open_videos(source, root=data.root, split="train"),
            weight,
            augment=data.augment is True or (data.augment == "real" and not is_generated(source)),
        )
        for source, weight in zip(data.train, weights, strict=True)
    ]
