"""What `qsam2 predict` writes: mask pictures, an overlay; each is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.output import writing
from qsam2.report.overlays import COLOURS, overlay

UNFINISHED = ".unfinished"
BACKGROUND = (0, 0, 0)


@contextlib.contextmanager
def outputs(folder: Path, names: Sequence[str], *, replace: bool) -> Iterator[Path]:
    """A folder to write these names into; they move to `folder` when the block ends without an error.

    Raises:
        UserError: one of them is there already and not to be replaced; the disk is full or the folder is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not replace:
        raise UserError(f"{there[0]} is there already: give another --out, or --force to replace it")
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
        with contextlib.suppress(OSError):  # it holds something
            if is_new:
                folder.rmdir()


def write_ids(path: Path, ids: np.ndarray, object_ids: Sequence[int]) -> None:
    """A palette PNG of object ids, uint8 (H, W), as DAVIS has them; an object has the colour of its overlay."""
    colours = dict(zip(object_ids, _colours(len(object_ids)), strict=True))
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette([channel for own_id in range(256) for channel in colours.get(own_id, BACKGROUND)])
    picture.save(path, format="PNG")


def read_ids(path: Path) -> np.ndarray:
    """What `write_ids` wrote."""
    with Image.open(path) as picture:
        return np.array(picture)


def write_overlay(path: Path, frame: np.ndarray, ids: np.ndarray, object_ids: Sequence[int]) -> None:
    """A picture, uint8 (H, W, 3), with its objects tinted and outlined."""
    Image.fromarray(_drawn(frame, ids, object_ids)).save(path, format="PNG")


def write_overlay_video(
    path: Path, video: Video, masks: Path, object_ids: Sequence[int], frames_per_second: Fraction
) -> None:
    """An mp4 (H.264) of all frames with the masks that `write_ids` wrote; an odd side grows by a pixel."""
    height, width = video.size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        for index in tqdm(range(len(video)), desc="overlay"):
            drawn = _drawn(video.frame(index), read_ids(masks / f"{video.frame_names[index]}.png"), object_ids)
            even = np.pad(drawn, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even)))
        container.mux(stream.encode())


def _drawn(frame: np.ndarray, ids: np.ndarray, object_ids: Sequence[int]) -> np.ndarray:
    return overlay(frame, [ids == object_id for object_id in object_ids])


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
