"""COCO's run-length codes and polygons as masks, whose numbers are checked before native code sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from qsam2.errors import UserError, short

FARTHEST = 10
"""Distance of a polygon's corner from its picture, in lengths of the longer side."""
LONGEST_OUTLINE = 4_000_000
"""Length of a polygon's outline in pixels: pycocotools takes some 100 bytes for each."""
_LONGEST_RUN = 6  # characters of 5 bits: more pixels than any picture has


def decode_region(region: Any, size: tuple[int, int], path: Path) -> np.ndarray:
    """A COCO segmentation, run-length code or polygons, as bool (H, W). Raises UserError naming `path`."""
    return decode_rle(region, size, path) if isinstance(region, dict) else fill_polygons(region, size, path)


def decode_rle(region: Any, size: tuple[int, int], path: Path) -> np.ndarray:
    """A COCO run-length code, compressed or not -> bool (H, W). Raises UserError naming `path` for a malformed one.

    Not `pycocotools.mask.decode`, which fills the rest of a mask from memory when its runs end early.
    """
    try:
        (height, width), counts = region["size"], region["counts"]
        if (height, width) != tuple(size):
            raise UserError(
                f"{path}: has a mask of {short(height)}x{short(width)} (height x width), "
                f"its picture is {size[0]}x{size[1]}"
            )
        (height, width), runs = size, _listed(counts) if isinstance(counts, list) else _run_lengths(counts)
        # each is checked, so that their sum cannot wrap around
        if ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
            raise ValueError(f"its runs do not make up {height}x{width} pixels")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: holds a malformed run-length code ({short(error)}); fetch it again") from error
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _listed(counts: list[Any]) -> np.ndarray:
    if not all(type(count) is int for count in counts):
        raise ValueError("its runs are not whole numbers")
    return np.array(counts, np.int64)


def _run_lengths(text: str | bytes) -> np.ndarray:
    """COCO's compressed counts: 5 bits a character, lowest first, signed; from the third on less the last but one."""
    digits = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    if ((digits < 0) | (digits > 63)).any():
        raise ValueError("it has characters that no code has")
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(ends[-1] + 1) - np.repeat(starts, ends - starts + 1)
    if place.max() >= _LONGEST_RUN:
        raise ValueError("it has a run longer than any picture")
    runs = np.add.reduceat((digits[: ends[-1] + 1] & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def fill_polygons(polygons: Any, size: tuple[int, int], path: Path) -> np.ndarray:
    """The union of polygons [[x1, y1, x2, ...], ...] in pixels as bool (H, W), rasterised by COCO's rule.

    Polygons of fewer than three points, which COCO has a few of, have no area.
    """
    try:
        if not isinstance(polygons, Sequence) or isinstance(polygons, str):
            raise ValueError(f"{type(polygons).__name__} instead of a list of polygons")
        outlines = [_checked(polygon, size) for polygon in polygons]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: holds a malformed polygon ({short(error)}); fetch the file again") from error
    areas = [outline.tolist() for outline in outlines if len(outline) >= 6]
    if not areas:
        return np.zeros(size, dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(areas, *size))).astype(bool)


def _checked(polygon: Any, size: tuple[int, int]) -> np.ndarray:
    """Coordinates (2 N,) that pycocotools can take: it crashes on those that are not finite or exceed its integers."""
    if not isinstance(polygon, Sequence) or not all(type(value) in (int, float) for value in polygon):
        raise ValueError("its coordinates are not a list of numbers")
    if len(polygon) % 2:
        raise ValueError("a coordinate lacks its pair")
    values = np.array(polygon, dtype=np.float64)
    points = values.reshape(-1, 2)
    if not np.isfinite(values).all() or (np.abs(values) > (1 + FARTHEST) * max(size)).any():
        raise ValueError(f"a corner is not within {FARTHEST} times the sides of its picture, {size[0]}x{size[1]}")
    if len(points) and np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > LONGEST_OUTLINE:
        raise ValueError(f"its outline is longer than {LONGEST_OUTLINE} pixels")
    return values
