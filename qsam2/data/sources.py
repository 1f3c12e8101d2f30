"""Videos named by one string, ``KIND[:ROOT[:SPLIT]]``, as recipes and the command line give them."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from qsam2.data.clips import Source
from qsam2.data.pictures import PICTURE_SUFFIXES, list_files, list_pictures
from qsam2.data.stills import coco_stills, instance_png_stills, sa1b_stills, yolo_stills
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.synthetic.warped_stills import WarpedStill, moving_cut_outs
from qsam2.data.unlabelled import UNLABELLED, VIDEO_SUFFIXES, has_masks, picture_source, video_source
from qsam2.data.video import Video
from qsam2.data.video_datasets import davis_videos, sav_videos
from qsam2.errors import UserError, short
from qsam2.recipe.recipe import Recipe
from qsam2.recipe.source import parts_of

_READERS: dict[str, Callable[[Path, str], Sequence[Video]]] = {
    "davis": davis_videos,
    "sav": sav_videos,
    "coco": coco_stills,
    "sa1b": lambda root, split: sa1b_stills(root),
    "yolo": yolo_stills,
    "instance_png": lambda root, split: instance_png_stills(root),
    "cut_outs": lambda root, split: _cut_outs(root, split),
    "images": picture_source,
    "video": video_source,
}
KINDS = ("moving_objects", *_READERS)
MOVING_OBJECTS_COUNT = {"train": 10_000, "val": 20, "test": 20}


def open_videos(spec: str, *, root: str | Path | None = None, split: str = "val") -> list[Video]:
    """The videos that `spec` names; `root` and `split` stand in for parts that it leaves out.

    ``davis:/data/DAVIS:val``, ``davis`` with `root`, ``moving_objects[:COUNT[:SPLIT]]`` (20 videos, 10000 of train),
    ``cut_outs:FOLDER`` (clips of COCO stills), ``images:FOLDER``, ``video:FILE_OR_FOLDER`` (see `unlabelled`). A
    relative root that does not exist is also looked for in $QSAM2_DATA. Raises UserError naming what is unknown,
    missing or malformed.
    """
    kind, place, own = parts_of(spec)
    split = own or split
    if kind not in KINDS:
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise UserError(f"data {spec!r}: {kind!r} is no kind of data; did you mean {nearest!r}? It is {_one_of(KINDS)}")
    if ":" in place and not os.path.exists(place):
        raise UserError(f"data {spec!r}: has too many parts; write {_form(kind)}")
    if kind == "moving_objects":
        if place and not (place.isdecimal() and len(place) < 10):
            raise UserError(f"data {spec!r}: the number of videos is {place!r}; write {_form(kind)}")
        return list(moving_objects(split, int(place or MOVING_OBJECTS_COUNT.get(split, 1))))  # type: ignore[arg-type]
    videos = list(_READERS[kind](_place(spec, kind, place or root), split))
    if twice := [name for name, count in Counter(video.name for video in videos).items() if count > 1]:
        raise UserError(f"data {spec!r}: holds {short(twice[0])!r} twice; rename or remove one, as scores go by name")
    return videos


def _cut_outs(root: Path, split: str) -> list[WarpedStill]:
    """`moving_cut_outs` of COCO's pictures; UserError if no object can move."""
    videos = moving_cut_outs(coco_stills(root, split))
    if not videos:
        raise UserError(f"{root}: shows no object that can be cut out, whole and on 1 to 25 % of its picture")
    return videos


def source_of(data: str | Path) -> str:
    """`KIND:...` of a folder or file, by what it holds: DAVIS, pictures or videos; a source is returned as it is."""
    text = str(data)
    path = Path(os.path.expanduser(data))
    if text.split(":")[0] in KINDS or not path.exists():
        if ":" in text or text in KINDS:
            return text
        raise UserError(f"data {text!r}: does not exist; give a folder or file, or KIND:ROOT:SPLIT ({_one_of(KINDS)})")
    if path.is_dir() and (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir():
        return f"davis:{text}"
    if path.is_file():
        return f"{'images' if path.suffix.lower() in PICTURE_SUFFIXES else 'video'}:{text}"
    holds_films = bool(list_files(path, VIDEO_SUFFIXES))
    return f"{'images' if not holds_films and list_pictures(path) else 'video'}:{text}"


def _place(spec: str, kind: str, root: str | Path | None) -> Path:
    if not root:
        raise UserError(f"data {spec!r}: needs the dataset's folder; write {_form(kind)} or give data.root=FOLDER")
    shared = os.environ.get("QSAM2_DATA")
    places = [Path(os.path.expanduser(root))]  # of a user that there is not, the name as it is
    if shared and not places[0].is_absolute():
        places.append(Path(shared) / root)
    place = next((p for p in places if p.is_dir() or (kind in UNLABELLED and p.is_file())), None)
    if place is None:
        looked = " nor ".join(str(p) for p in places)
        what = "file or folder" if kind in UNLABELLED else "folder"
        raise UserError(
            f"data {spec!r}: there is no {what} {looked}; give the dataset's folder as data.root=FOLDER or "
            f"{_form(kind)}, or set QSAM2_DATA to the folder that holds {root}"
        )
    return place


def _form(kind: str) -> str:
    places = {"moving_objects": "[:COUNT[:SPLIT]]", "video": ":FILE_OR_FOLDER[:SPLIT]"}
    return kind + places.get(kind, ":FOLDER[:SPLIT]")


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
    if not has_masks(stills):
        raise UserError(f"evaluate.stills={spec}: has no masks; name annotated images, such as coco:FOLDER, or null")
    if any(len(still) > 1 for still in stills):
        raise UserError(f"evaluate.stills={spec}: holds videos; name images, such as coco:FOLDER, or null")
    return stills


def open_train(recipe: Recipe) -> list[Source]:
    """The recipe's train sources with their weights; none if it neither calibrates nor trains.

    Raises UserError if a source cannot be used, or the recipe trains on one without masks.
    """
    if recipe.quantize is None and recipe.train is None:
        return []
    data = recipe.data
    weights = data.weights or (1.0,) * len(data.train)
    sources = []
    for spec, weight in zip(data.train, weights, strict=True):
        videos = open_videos(spec, root=data.root, split="train")
        if recipe.train is not None and not has_masks(videos):
            raise UserError(
                f"data.train={spec}: training needs masks, and this source has none: give one with masks, or "
                "train=null to calibrate alone"
            )
        real = spec.split(":")[0] != "moving_objects"
        sources.append(Source(videos, weight, augment=data.augment is True or (data.augment == "real" and real)))
    return sources
