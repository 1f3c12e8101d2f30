"""Tracked masks as files, in the layouts of the benchmark servers of DAVIS and SA-V."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.output import writing
from qsam2.recipe.recipe import EvaluateRecipe

PALETTE = [
    sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
    for index in range(256)
    for channel in range(3)
]
"""Colours of object ids, red, green, blue in turn: each bit of an id sets the highest free bit of a channel."""


def check_masks_folder(folder: Path, videos: Sequence[Video]) -> None:
    """Raise UserError unless masks can be written: a new folder, videos that are tracked."""
    if folder.exists():
        raise UserError(f"--save-masks {folder}: exists already; give a new folder")
    if all(len(video) == 1 for video in videos):
        raise UserError("--save-masks writes tracked masks, but the data holds pictures: give videos")


def write_masks(folder: Path, videos: Sequence[Video], predictions: Predictions, evaluation: EvaluateRecipe) -> None:
    """Write all masks, or none: `VIDEO/FRAME.png` of object ids (davis), or `VIDEO/OBJECT/FRAME.png` (sav).

    In sav, object 1 is folder 000, as SA-V names them; in davis, the object with the lowest id has a pixel of several.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        with writing(folder):
            for video in videos:
                length = min(len(video), evaluation.frames or len(video))
                masks = _unpacked(video, predictions, length)
                for index, name in enumerate(video.frame_names[:length]):
                    if evaluation.protocol == "sav":
                        for item, frames in masks.items():
                            _write(unfinished / video.name / f"{item - 1:03d}" / f"{name}.png", frames[index])
                        continue
                    ids = np.zeros(video.size, np.uint8)
                    for item in sorted(masks, reverse=True):
                        ids[masks[item][index] > 0] = item
                    _write(unfinished / video.name / f"{name}.png", ids)
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unpacked(video: Video, predictions: Predictions, length: int) -> dict[int, np.ndarray]:
    """Object id to its masks, uint8 (length, H, W) of 0 and 1."""
    height, width = video.size
    return {
        item: np.unpackbits(packed, count=length * height * width).reshape(length, height, width)
        for (name, item), packed in predictions.items()
        if name == video.name
    }


def _write(file: Path, ids: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette(PALETTE)
    picture.save(file)
