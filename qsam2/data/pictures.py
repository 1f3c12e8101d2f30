"""Checked reading of pictures and masks: a damaged file is an error that names it, never other pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from qsam2.errors import UserError
from qsam2.inputs import short

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def list_pictures(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The pictures of a folder in frame order (``2`` before ``10``); none where the folder does not exist."""
    if not folder.is_dir():
        return []
    pictures = (path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith("."))

    def frame_order(path: Path) -> tuple[int, int, str]:
        stem = path.stem
        return (0, int(stem), stem) if stem.isdecimal() else (1, len(stem), stem)

    return sorted(pictures, key=frame_order)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of reading it."""
    try:
        yield
    except _BROKEN as error:
        raise UserError(
            f"{path}: cannot be read as a picture ({short(error)}); fetch the file again or remove it"
        ) from error


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header alone."""
    with _naming(path), Image.open(path) as picture:
        return picture.height, picture.width


def read_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture of `size` (height, width) as RGB, uint8 (H, W, 3), decoded by PIL as SAM2 does."""
    with _naming(path), Image.open(path) as picture:
        frame = np.array(picture.convert("RGB"))
    return _of_size(frame, size, path)


def read_index_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A PNG of object ids as integers (H, W), 0 where there is none.

    In a palette file 255 is void and becomes 0, as in DAVIS. A grey picture of 0 and 255 alone (or a one-bit picture)
    shows one object, which becomes id 1; beside other ids 255 is void. Raises UserError for a colour picture.
    """
    with _naming(path):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()  # PIL checks the pixel chunks' checksums only here
        with Image.open(io.BytesIO(data)) as picture:
            mode, ids = picture.mode, np.array(picture)
    if ids.ndim == 3 and (ids[..., :3] == ids[..., :1]).all():
        mode, ids = "L", ids[..., 0].copy()  # a few DAVIS-2016 masks are grey pictures saved in colour
    if ids.ndim != 2:
        raise UserError(f"{path}: a mask picture holds one object id a pixel (palette or grey), this one is {mode}")
    if ids.dtype == bool:
        ids = ids.astype(np.uint8)
    elif mode == "L" and np.isin(ids, (0, 255)).all():
        ids = (ids == 255).astype(np.uint8)
    elif mode in ("L", "P"):
        ids[ids == 255] = 0
    return _of_size(ids, size, path)


def split_ids(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Index mask (H, W) -> {object id: bool (H, W)}, without the background 0."""
    return {int(i): ids == i for i in np.unique(ids) if i != 0}


def _of_size(array: np.ndarray, size: tuple[int, int] | None, path: Path) -> np.ndarray:
    if size is not None and array.shape[:2] != tuple(size):
        raise UserError(
            f"{path}: is {array.shape[0]}x{array.shape[1]} (height x width), "
            f"expected {size[0]}x{size[1]}; all frames and masks of a video or still have one size"
        )
    return array
