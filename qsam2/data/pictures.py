"""Checked reading of pictures, masks and JSON: a damaged file is an error that names it, never other pixels."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qsam2.errors import UserError

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
            f"{path}: cannot be read as a picture ({_one_line(error)}); fetch the file again or remove it"
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


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError where it is absent or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({_one_line(error)}); fetch or write it again") from error


def decode_rle(region: Any, size: tuple[int, int], path: Path) -> np.ndarray:
    """A COCO run-length code, compressed or not -> bool (H, W). Raises UserError naming `path` for a malformed one.

    Not `pycocotools.mask.decode`, which fills the rest of a mask from memory when its runs end early.
    """
    try:
        height, width = (int(side) for side in region["size"])
        counts = region["counts"]
        runs = np.array(counts) if isinstance(counts, list) else _run_lengths(counts)
        if runs.dtype.kind not in "iu" or (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"its runs do not make up {height}x{width} pixels")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: holds a malformed run-length code ({_one_line(error)}); fetch it again") from error
    if (height, width) != tuple(size):
        raise UserError(f"{path}: has a mask of {height}x{width} (height x width), its picture is {size[0]}x{size[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _run_lengths(text: str | bytes) -> np.ndarray:
    """COCO's compressed counts: 5 bits a character, lowest first, signed; from the third on less the last but one."""
    digits = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(ends[-1] + 1) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((digits[: ends[-1] + 1] & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _of_size(array: np.ndarray, size: tuple[int, int] | None, path: Path) -> np.ndarray:
    if size is not None and array.shape[:2] != tuple(size):
        raise UserError(
            f"{path}: is {array.shape[0]}x{array.shape[1]} (height x width), "
            f"expected {size[0]}x{size[1]}; all frames and masks of a video or still have one size"
        )
    return array


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
