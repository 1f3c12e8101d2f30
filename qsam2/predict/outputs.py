"""Files of `qsam2 predict`: masks as palette PNGs and an overlay. They appear together when all are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.output import writing
from qsam2.report.overlays import COLOURS, overlay, write_video

UNFINISHED = ".unfinished"
BACKGROUND = (0, 0, 0)


@contextlib.contextmanager
def outputs(folder: Path, names: Sequence[str], *, replace: bool) -> Iterator[Path]:
    """Context manager: a temporary folder, whose files or folders `names` move to `folder` if the block succeeds.

    Raises:
        UserError: one of them exists and `replace` is False; the disk is full or the folder is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    existing = [folder / name for name in names if (folder / name).exists()]
    if existing and not replace:
        raise UserError(f"{existing[0]} is there already: give another --out, or --force to replace it")
    unfinished = folder / UNFINISHED
    is_new = not folder.exists()
    try:
        with writing(folder):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            unfinished.mkdir(parents=True)
            yield unfinished
            for name in names:
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            if is_new:
                folder.rmdir()


def write_ids(path: Path, ids: np.ndarray, object_ids: Sequence[int]) -> None:
    """Write object ids, uint8 (H, W), as a palette PNG like DAVIS's; the palette has the colours of the overlay."""
    colours = {object_id: COLOURS[index % len(COLOURS)] for index, object_id in enumerate(object_ids)}
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette([channel for value in range(256) for channel in colours.get(value, BACKGROUND)])
    picture.save(path, format="PNG")


def read_ids(path: Path) -> np.ndarray:
    """Read object ids, uint8 (H, W), that `write_ids` wrote."""
    with Image.open(path) as picture:
        return np.array(picture)


def write_overlay(path: Path, frame: np.ndarray, ids: np.ndarray, object_ids: Sequence[int]) -> None:
    """Write a picture, uint8 (H, W, 3), with its objects tinted and outlined."""
    Image.fromarray(_drawn(frame, ids, object_ids)).save(path, format="PNG")


def write_overlay_video(
    path: Path, video: Video, masks: Path, object_ids: Sequence[int], frames_per_second: Fraction
) -> None:
    """Write all frames with the masks that `write_ids` wrote into the folder `masks`, as MP4."""
    frames = (
        _drawn(video.frame(index), read_ids(masks / f"{video.frame_names[index]}.png"), object_ids)
        for index in tqdm(range(len(video)), desc="overlay")
    )
    write_video(str(path), frames, frames_per_second=frames_per_second)


def _drawn(frame: np.ndarray, ids: np.ndarray, object_ids: Sequence[int]) -> np.ndarray:
    return overlay(frame, [ids == object_id for object_id in object_ids])
