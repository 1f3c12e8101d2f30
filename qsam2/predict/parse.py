"""Prompts parsed from the command line's options, whose order matters: `--object` and `--frame` apply to later ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qsam2.data.index_masks import read_ids, split_ids
from qsam2.data.video import Video
from qsam2.errors import UserError

Word: TypeAlias = tuple[str, str]
"""An option (object, frame, point, box or mask) and its text."""
LARGEST_ID = 254
"""Largest object id: 255 is void in mask files."""


@dataclass
class Prompt:
    """Prompt of one object on one frame, in pixels: points (x, y) with label 1 inside or 0 outside, a box, a mask."""

    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: tuple[float, ...] | None = None
    mask: np.ndarray | None = None
    """bool (H, W)"""


Prompts: TypeAlias = dict[int, dict[int, Prompt]]
"""{object id: {frame: prompt}}"""


def read_prompts(words: Sequence[Word], video: Video) -> Prompts:
    """Prompts of a video or a picture.

    Without `object`, prompts are for object 1, and a mask file with several ids prompts each of its objects; without
    `frame`, they are on the first frame.

    Raises:
        UserError: there is no prompt, or one is malformed, outside the picture, on no frame, of another size, given
            twice, or has only points outside its object.
    """
    prompts: Prompts = {}
    object_id, frame = None, 0
    for position, (kind, text) in enumerate(words):
        if kind in ("object", "frame"):
            if position + 1 == len(words):
                raise UserError(f"--{kind} {text}: no prompt follows it; it holds for the prompts behind it")
            if kind == "object":
                object_id = _whole(kind, text, 1, LARGEST_ID, "objects have ids")
            else:
                frame = _whole(kind, text, 0, len(video) - 1, f"{video.name} has frames")
        elif kind == "mask":
            for own_id, mask in _masks(text, object_id, video.size):
                prompt = _of(prompts, own_id, frame)
                _once(prompt.mask, kind, own_id, frame)
                prompt.mask = mask
        else:
            prompt = _of(prompts, object_id or 1, frame)
            numbers = _numbers(kind, text, video.size)
            if kind == "box":
                _once(prompt.box, kind, object_id or 1, frame)
                prompt.box = numbers
            else:
                prompt.points.append((numbers[0], numbers[1]))
                prompt.labels.append(int(numbers[2]) if len(numbers) == 3 else 1)
    if not prompts:
        raise UserError("nothing says what to segment: give --point X,Y, --box X0,Y0,X1,Y1 or --mask PNG")
    for own_id, frames in prompts.items():
        for number, prompt in frames.items():
            if prompt.box is None and prompt.mask is None and 1 not in prompt.labels:
                raise UserError(f"object {own_id} has only points off it on frame {number}: give one on it as well")
    return prompts


def _of(prompts: Prompts, object_id: int, frame: int) -> Prompt:
    return prompts.setdefault(object_id, {}).setdefault(frame, Prompt())


def _once(before: object, kind: str, object_id: int, frame: int) -> None:
    if before is not None:
        raise UserError(
            f"--{kind}: object {object_id} has one on frame {frame} already; --object N before it is for another object"
        )


def _whole(kind: str, text: str, low: int, high: int, what: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise UserError(f"--{kind} {text}: {what} {low} to {high}")
    return int(text)


def _numbers(kind: str, text: str, size: tuple[int, int]) -> tuple[float, ...]:
    height, width = size
    form, example, counts = {
        "point": ("X,Y or X,Y,LABEL in pixels, LABEL 1 on the object or 0 off it", "320,180", (2, 3)),
        "box": ("X0,Y0,X1,Y1 in pixels", "10,20,200,150", (4,)),
    }[kind]
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts or not np.isfinite(numbers).all() or (len(numbers) == 3 and numbers[2] not in (0, 1)):
        raise UserError(f"--{kind} {text!r}: give {form}, as {example}")
    corners = [numbers[:2], numbers[2:]] if kind == "box" else [numbers[:2]]
    if any(not (0 <= x <= width and 0 <= y <= height) for x, y in corners):
        raise UserError(f"--{kind} {text} is outside the picture, which is {width}x{height} (width x height)")
    if kind == "box" and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise UserError(f"--box {text} is empty: give its left, top, right and bottom edge, as {example}")
    return numbers


def _masks(text: str, object_id: int | None, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    path = Path(text)
    if not path.is_file():
        raise UserError(f"--mask {path}: no such file; give a PNG of object ids, or of black and white")
    ids = read_ids(path, size)
    if not ids.any():
        raise UserError(f"--mask {path}: shows no object, all its pixels are 0 or void")
    if object_id is not None:
        yield object_id, ids > 0
        return
    for own_id, mask in split_ids(ids).items():
        if own_id > LARGEST_ID:
            raise UserError(f"--mask {path}: has object {own_id}, objects have ids 1 to {LARGEST_ID}")
        yield own_id, mask
