"""Stills with instance masks as videos of one frame: COCO, SA-1B, YOLO polygons, instance PNGs."""

from __future__ import annotations

import logging
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from qsam2.data.index_masks import MaskFiles, split_ids
from qsam2.data.pictures import decode_rle, files_below, list_files, list_pictures, read_json, subfolders
from qsam2.data.video import Masks, Picture
from qsam2.errors import UserError

_log = logging.getLogger(__name__)


def coco_stills(root: Path, split: str) -> list[Picture]:
    """COCO's pictures that have instances; crowds are left out.

    ``ROOT/annotations/instances_SPLIT[2017].json`` with ``ROOT[/images]/SPLIT[2017]``, or ``ROOT/instances.json`` with
    ``ROOT/images`` for any split. Raises UserError naming the file that is missing or malformed.
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
    data = read_json(path)
    regions: dict[Any, list[Any]] = defaultdict(list)
    try:
        for annotation in data["annotations"]:
            if not annotation.get("iscrowd", 0):
                regions[annotation["image_id"]].append(annotation["segmentation"])
        names = [(image["file_name"], regions[image["id"]]) for image in data["images"] if image["id"] in regions]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not COCO's instance format ({type(error).__name__}: {error})") from error
    present = {picture.name for picture in list_pictures(folder)}
    missing = [name for name, _ in names if name not in present]
    if missing:
        raise UserError(f"{folder / missing[0]}: is missing, but {path} annotates it ({len(missing)} missing in all)")
    return _non_empty([Picture(folder / name, partial(_regions, path, region)) for name, region in names], path)


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
    files = {path.stem: path for path in list_files(labels / name, (".txt",)) if path.stat().st_size}
    pictures = [path for path in list_pictures(images / name) if path.stem in files]
    stray = sorted(files.keys() - {path.stem for path in pictures})
    if stray:
        _log.warning("%s: %d label files have no picture and are left out (%s.txt, ...)", labels, len(stray), stray[0])
    return _non_empty([Picture(path, partial(_polygon_file, files[path.stem])) for path in pictures], labels / name)


def instance_png_stills(root: Path) -> list[Picture]:
    """``ROOT/images/X.jpg`` (or png) and ``ROOT/instance_png/X.png``, a picture of instance numbers."""
    images, masks = root / "images", root / "instance_png"
    pictures = {path.stem: path for path in list_pictures(images)}
    files = list_pictures(masks)
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
    return {
        k: decode_rle(region, size, path) if isinstance(region, dict) else _fill(region, size, path)
        for k, region in enumerate(regions, 1)
    }


def _sa1b_file(path: Path, size: tuple[int, int]) -> Masks:
    data = read_json(path)
    try:
        regions = [annotation["segmentation"] for annotation in data["annotations"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is not SA-1B's format ({type(error).__name__}: {error})") from error
    return _regions(path, regions, size)


def _polygon_file(path: Path, size: tuple[int, int]) -> Masks:
    height, width = size
    instances = {}
    for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            points = np.array([float(number) for number in line.split()[1:]]).reshape(-1, 2)
        except ValueError as error:
            raise UserError(f"{path}, line {k}: is not a class and pairs of coordinates ({error})") from error
        if len(points) < 3:
            raise UserError(f"{path}, line {k}: has {len(points)} points, a polygon needs 3; boxes are not masks")
        if not ((points >= 0) & (points <= 1)).all():
            raise UserError(f"{path}, line {k}: coordinates must lie in 0..1, they are shares of width and height")
        instances[k] = _fill([(points * (width, height)).ravel().tolist()], size, path)
    return instances


def _index_file(masks: MaskFiles, path: Path, size: tuple[int, int]) -> Masks:
    return split_ids(masks.read(path, size))


def _fill(polygons: Any, size: tuple[int, int], path: Path) -> np.ndarray:
    """The union of polygons [[x1, y1, x2, ...], ...] in pixels as bool (H, W), rasterised by COCO's rule.

    Polygons of fewer than three points, which COCO has a few of, have no area.
    """
    try:
        if any(len(polygon) % 2 for polygon in polygons):
            raise ValueError("a coordinate lacks its pair")
        areas = [polygon for polygon in polygons if len(polygon) >= 6]
        if not areas:
            return np.zeros(size, dtype=bool)
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(areas, *size))).astype(bool)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: holds a malformed polygon ({error}); fetch the file again") from error
