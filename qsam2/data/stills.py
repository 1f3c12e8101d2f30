"""Stills with instance masks as videos of one frame: COCO, SA-1B, YOLO polygons, instance PNGs."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from typing_extensions import NotRequired, TypedDict

from qsam2.data.index_masks import MaskFiles, split_ids
from qsam2.data.pictures import by_stem, files_below, list_files, list_pictures, subfolders
from qsam2.data.regions import decode_region, fill_polygons
from qsam2.data.video import Masks, Picture
from qsam2.errors import UserError, short
from qsam2.inputs import read_json, read_text

MARGIN = 1e-3
"""Distance from 0..1 at which YOLO's coordinates are taken for rounded ones, and clipped."""
_SHORTEST_LABEL = 64  # bytes; longer files hold something, and are read when they are asked for
_log = logging.getLogger(__name__)


class _CocoImage(TypedDict):
    id: int | str
    file_name: str


class _CocoAnnotation(TypedDict):
    image_id: int | str
    segmentation: list[Any] | dict[str, Any]
    iscrowd: NotRequired[int | bool]


class _Coco(TypedDict):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]


class _Sa1bAnnotation(TypedDict):
    segmentation: list[Any] | dict[str, Any]


class _Sa1b(TypedDict):
    annotations: list[_Sa1bAnnotation]


def coco_stills(root: Path, split: str) -> list[Picture]:
    """COCO's pictures that have instances; crowds are left out.

    ``ROOT/annotations/instances_SPLIT[2017].json`` with ``ROOT[/images]/SPLIT[2017]``, or ``ROOT/instances.json`` with
    ``ROOT/images`` for any split. A file name may have folders, from the pictures' folder or from ROOT.
    Raises UserError naming the file that is missing, malformed or outside ROOT.
    """
    choices = [(root / "instances.json", [root / "images"])]
    for name in (split, f"{split}2017"):
        choices.append((root / "annotations" / f"instances_{name}.json", [root / name, root / "images" / name]))
    path, folders = next((choice for choice in choices if choice[0].is_file()), (None, []))
    if path is None:
        raise UserError(f"{root}: has neither {' nor '.join(str(c[0].relative_to(root)) for c in choices)}; add one")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"{folders[0]}: is missing, it should hold the pictures of {path}")
    data: _Coco = read_json(path, _Coco, what="COCO's instance format")
    regions: dict[int | str, list[Any]] = defaultdict(list)
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd", 0):
            regions[annotation["image_id"]].append(annotation["segmentation"])
    ids = Counter(image["id"] for image in data["images"])
    if twice := [short(item) for item, count in ids.items() if count > 1]:
        raise UserError(f"{path}: has two images of the id {twice[0]}; their annotations cannot be told apart")
    if stray := [short(repr(item)) for item in regions if item not in ids]:
        _log.warning("%s: annotations of %d images that it does not list are left out (%s)", path, len(stray), stray[0])
    annotated = [(image["file_name"], regions[image["id"]]) for image in data["images"] if image["id"] in regions]
    names = [name for name, _ in annotated]
    pictures = [_inside(root, folder, name, path) for name in names]
    missing = [name for name, picture in zip(names, pictures, strict=True) if picture is None]
    if missing:
        raise UserError(
            f"{folder / short(missing[0])}: is missing, but {path} annotates it ({len(missing)} missing in all)"
        )
    stills = [
        Picture(picture, partial(_regions, path, region))
        for picture, (_, region) in zip(pictures, annotated, strict=True)
        if picture is not None
    ]
    return _non_empty(_named_apart(stills, names), path)


def _inside(root: Path, folder: Path, name: str, path: Path) -> Path | None:
    """The picture that COCO's file names, below the pictures' folder or the dataset's; None if there is none.

    Raises UserError if the name leads out of the dataset's folder.
    """
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        raise UserError(f"{path}: names the picture {short(name)!r}, outside of {root}; give names within it")
    for place in (folder, root, root / "images"):
        with contextlib.suppress(OSError, ValueError):  # no name that a file can have
            if (place / name).is_file():
                return place / name
    return None


def _named_apart(stills: list[Picture], names: Sequence[str]) -> list[Picture]:
    """Stills whose names differ: where two files of different folders are called alike, by folder and file."""
    count = Counter(still.name for still in stills)
    for still, name in zip(stills, names, strict=True):
        if count[still.name] > 1:
            still.name = name.replace("/", "-")
    return stills


def sa1b_stills(root: Path) -> list[Picture]:
    """SA-1B: ``sa_1.jpg`` and ``sa_1.json`` side by side, below ROOT."""
    files = files_below(root, "*.json")
    for path in files:
        if not path.with_suffix(".jpg").is_file():
            raise UserError(f"{path.with_suffix('.jpg')}: is missing, but {path.name} annotates it; add the picture")
    return _non_empty([Picture(path.with_suffix(".jpg"), partial(_sa1b_file, path)) for path in files], root)


def yolo_stills(root: Path, split: str) -> list[Picture]:
    """YOLO's polygons: ``ROOT/images/SPLIT/X.jpg`` and ``ROOT/labels/SPLIT/X.txt``, one normalized polygon per line.

    SPLIT may leave out the year of its folder (``train`` for ``train2017``). As in YOLO, pictures
    without labels are left out, and labels without a picture too, with a warning.
    """
    images, labels = root / "images", root / "labels"
    name = next((name for name in (split, f"{split}2017") if (images / name).is_dir()), None)
    if name is None:
        raise UserError(f"{images}: has no split {split!r}; there is {', '.join(subfolders(images)) or 'no folder'}")
    files = {path.stem: path for path in list_files(labels / name, (".txt",)) if not _is_blank(path)}
    pictures = [*by_stem(path for path in list_pictures(images / name) if path.stem in files).values()]
    stray = sorted(files.keys() - {path.stem for path in pictures})
    if stray:
        _log.warning("%s: %d label files have no picture and are left out (%s.txt, ...)", labels, len(stray), stray[0])
    return _non_empty([Picture(path, partial(_polygon_file, files[path.stem])) for path in pictures], labels / name)


def instance_png_stills(root: Path) -> list[Picture]:
    """``ROOT/images/X.jpg`` (or png) and ``ROOT/instance_png/X.png``, a picture of instance numbers."""
    images, masks = root / "images", root / "instance_png"
    pictures = by_stem(list_pictures(images))
    files = [*by_stem(list_pictures(masks)).values()]
    for path in files:
        if path.stem not in pictures:
            raise UserError(f"{path}: is a mask without its picture in {images}; add the picture")
    read = MaskFiles(files)
    return _non_empty([Picture(pictures[path.stem], partial(_index_file, read, path)) for path in files], masks)


def _non_empty(stills: list[Picture], place: Path) -> list[Picture]:
    if not stills:
        raise UserError(f"{place}: has no annotated pictures; see the dataset cards for the layout that is expected")
    return stills


def _regions(path: Path, regions: list[Any], size: tuple[int, int]) -> Masks:
    """COCO segmentations (polygons or run-length codes) -> instances."""
    return {k: decode_region(region, size, path) for k, region in enumerate(regions, 1)}


def _sa1b_file(path: Path, size: tuple[int, int]) -> Masks:
    data: _Sa1b = read_json(path, _Sa1b, what="SA-1B's format")
    return _regions(path, [annotation["segmentation"] for annotation in data["annotations"]], size)


def _is_blank(path: Path) -> bool:
    return path.stat().st_size < _SHORTEST_LABEL and not read_text(path).strip()


def _polygon_file(path: Path, size: tuple[int, int]) -> Masks:
    height, width = size
    lines = [(k, line) for k, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    instances = {}
    for instance, (k, line) in enumerate(lines, 1):
        try:
            number, *coordinates = map(float, line.split())
            if number < 0 or not number.is_integer():
                raise ValueError(f"the class is {number}")
            points = np.array(coordinates).reshape(-1, 2)
        except ValueError as error:
            raise UserError(f"{path}, line {k}: is not a class and pairs of coordinates ({short(error)})") from error
        if len(points) < 3:
            raise UserError(f"{path}, line {k}: has {len(points)} points, a polygon needs 3; boxes are not masks")
        if not ((points >= -MARGIN) & (points <= 1 + MARGIN)).all():
            raise UserError(f"{path}, line {k}: coordinates must lie in 0..1, they are shares of width and height")
        pixels = points.clip(0, 1) * (width, height)
        instances[instance] = fill_polygons([pixels.ravel().tolist()], size, path)
    return instances


def _index_file(masks: MaskFiles, path: Path, size: tuple[int, int]) -> Masks:
    return split_ids(masks.read(path, size))
