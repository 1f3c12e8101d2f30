"""Checked reading of pictures: a damaged file is an error that names it, never other pixels.

Mask pictures are read by `qsam2.data.index_masks.MaskFiles`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from qsam2.errors import UserError, short

_log = logging.getLogger(__name__)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OTHER_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jfif", ".ppm", ".pgm", ".tga", ".exr", ".dng")
"""Pictures that are not read, and must not vanish from between others."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""Formats that PIL may read, whatever a file is called: some of its others start programs."""
MAX_PIXELS = 100_000_000
"""Largest picture or frame of a film that is read, 10,000 x 10,000: a small file can claim any amount of memory."""
_LEFT_BY_SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Turns that set a picture of each EXIF orientation upright; those from 5 on swap height and width."""
_DEPTHS = (8, 10, 12, 14, 16)
_PROBED = 64
"""Most pictures of a folder that are read to find their depth."""


def is_visible(path: Path) -> bool:
    """False for what file systems and archivers leave between files: ``._x.jpg``, ``__MACOSX``, ``Thumbs.db``."""
    return not (path.name.startswith(".") or path.name in _LEFT_BY_SYSTEMS)


def list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder with one of the suffixes, in any case, sorted; none where the folder does not exist."""
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.suffix.lower() in suffixes and is_visible(path))
    return sorted(path for path in files if path.is_file() or path.is_symlink())  # a broken link is an error on reading


def list_pictures(folder: Path, suffixes: tuple[str, ...] = PICTURE_SUFFIXES) -> list[Path]:
    """The pictures of a folder in frame order (``2`` before ``10``); none where the folder does not exist."""

    def frame_order(path: Path) -> tuple[int, int, str]:
        stem = path.stem
        return (0, int(stem), stem) if stem.isdecimal() else (1, len(stem), stem)

    return sorted(list_files(folder, suffixes), key=frame_order)


def by_stem(files: Iterable[Path]) -> dict[str, Path]:
    """Files by name without suffix, in their order. Raises UserError where two have one name."""
    paths: dict[str, Path] = {}
    for file in files:
        if (before := paths.setdefault(file.stem, file)) != file:
            raise UserError(f"{before}: is there again as {file.name}; keep one of them")
    return paths


def files_below(root: Path, pattern: str) -> list[Path]:
    """The files of a pattern (``*.json``) in a folder and all folders in it, sorted."""
    found = root.rglob(pattern)
    return sorted(path for path in found if all(map(is_visible, [path, *path.relative_to(root).parents][:-1])))


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_visible(path))


@contextmanager
def opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Context manager: a picture file of which the header is read. Any error in the block names the file.

    Raises UserError for another format than `FORMATS`, for more than `MAX_PIXELS`, for a damaged file and for several
    pictures in one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about metadata and size
            # not by name: PIL maps a named TIFF into memory, and garbles one that it turns
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{picture.width * picture.height} pixels")
                _check_single(picture, path)
                yield picture
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise UserError(f"{path}: has {pixels:,} pixels, at most {MAX_PIXELS:,} are read; scale it down") from error
    except Exception as error:  # PIL raises many kinds on damaged files
        no_picture = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(FORMATS)}" if no_picture else short(error)
        raise UserError(f"{path}: cannot be read as a picture ({reason}); fetch the file again or remove it") from error


def _check_single(picture: Image.Image, path: Path) -> None:
    """Refuse animations and stacks. A camera's second picture (MPO) and pages of other sizes, previews, are let be."""
    count = getattr(picture, "n_frames", 1)
    if count == 1 or picture.format == "MPO":
        return
    size = picture.size
    picture.seek(1)
    if picture.size == size:
        raise UserError(f"{path}: holds {count} pictures of one size; write each as a file, or all as a video")
    picture.seek(0)


def _orientation(picture: Image.Image) -> int:
    """EXIF's number, 1 for upright."""
    if picture.format == "TIFF":
        return 1  # PIL turns these itself
    if picture.format == "PNG":
        picture.load()  # its EXIF may follow its pixels
    try:
        number = picture.getexif().get(0x0112)
    except Exception:  # damaged metadata beside sound pixels
        return 1
    return number if number in _TURNS else 1


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation."""
    number = _orientation(picture)
    return picture if number == 1 else picture.transpose(_TURNS[number])


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header alone but for PNG."""
    with opened(path) as picture:
        return (picture.width, picture.height) if _orientation(picture) >= 5 else (picture.height, picture.width)


def read_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture of `size` (height, width) as RGB, uint8 (H, W, 3), decoded by PIL as SAM2 does, but upright.

    Alpha is left out. Grey of 16 bits is scaled to 8 by the depth of its folder's pictures (8, 10, 12, 14 or 16 bits).
    Raises UserError naming the mode for floating point and other depths.
    """
    with opened(path) as picture:
        turned = upright(_in_8_bits(picture, path))
        frame = np.array(turned if turned.mode == "RGB" else turned.convert("RGB"))  # a conversion is a copy
    return of_size(frame, size, path)


def is_deep_colour(picture: ImageFile.ImageFile) -> bool:
    """True for colours of 16 bits per channel, of which PIL gives the upper 8. To be asked before pixels are read."""
    return ";16" in str(picture.tile) and not picture.mode.startswith("I")


def _in_8_bits(picture: ImageFile.ImageFile, path: Path) -> Image.Image:
    if picture.mode == "F":
        raise UserError(f"{path}: holds floating-point pixels (mode F), whose range is unknown; write 8 or 16 bits")
    deep_colour = is_deep_colour(picture)
    if not (deep_colour or picture.mode.startswith("I")):
        return picture
    bits = _depth(path.parent, path.parent.stat().st_mtime_ns)
    largest = 2**bits - 1
    if deep_colour:
        if bits < 16:
            raise UserError(
                f"{path}: holds {bits} bits in 16 of each colour (mode {picture.mode}), of which only the upper 8 are "
                "read; scale the values to 16 bits, or write 8"
            )
        return picture
    values = np.array(picture).astype(np.int64)
    if not 0 <= values.min() <= values.max() <= largest:
        raise UserError(
            f"{path}: has values from {values.min()} to {values.max()} (mode {picture.mode}), "
            f"expected 0 to {largest} as in {path.parent}; write 8 or 16 bits"
        )
    if largest >> 8 < values.max() < largest >> 4:
        raise UserError(
            f"{path}: its brightest pixel is {values.max()} (mode {picture.mode}), but {path.parent} holds "
            f"{bits}-bit pictures: it is nearly black or of less depth; scale it, or write 8 bits"
        )
    return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))


@lru_cache(maxsize=256)
def _depth(folder: Path, changed_ns: int) -> int:
    """Bits of the 16-bit pictures of a folder, by their brightest value: one number, so that frames do not flicker."""
    paths = list_pictures(folder)
    brightest = 0
    for path in paths[:: -(-len(paths) // _PROBED) or 1]:
        try:
            with opened(path) as picture:
                if is_deep_colour(picture):
                    brightest = max(brightest, 257 * int(np.array(picture.convert("RGB")).max()))
                elif picture.mode.startswith("I"):
                    brightest = max(brightest, int(np.array(picture).max()))
        except UserError:
            continue  # raised when it is read itself
        if brightest >= 2 ** _DEPTHS[-2]:
            return _DEPTHS[-1]
    bits = next(depth for depth in _DEPTHS if brightest < 2**depth)
    _log.warning("%s: the 16-bit pictures hold values up to %d and are read as %d-bit", folder, brightest, bits)
    return bits


def of_size(array: np.ndarray, size: tuple[int, int] | None, path: Path) -> np.ndarray:
    if size is not None and array.shape[:2] != tuple(size):
        raise UserError(
            f"{path}: is {array.shape[0]}x{array.shape[1]} (height x width), "
            f"expected {size[0]}x{size[1]}; all frames and masks of a video or still have one size"
        )
    return array
