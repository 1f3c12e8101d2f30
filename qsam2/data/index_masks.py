"""Mask pictures -> object ids. What their pixel values mean is decided once for all files of a video or folder.

One picture cannot tell: a frame of 0 and 255 shows one object in DAVIS-2016, and only the void border where an object
has left the view in a set of grey ids.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from qsam2.data.pictures import is_deep_colour, of_size, opened, upright
from qsam2.errors import UserError

_log = logging.getLogger(__name__)
VOID = 255
"""A palette's index, or grey value, of pixels that belong to no object. In 16 bits it is 65535."""
DIMMEST_SOFT = 64
"""Soft masks of 8 bits have edges brighter than this. Of grey ids beside 255, one must be below."""
NEAR_WHITE = 240
"""From here on a grey is white changed by JPEG, not an id."""
SOLID = 0.05
"""Share of an id's pixels that have four neighbours of the same id; the greys of a soft edge have none."""
_PROBED = 500
"""Most files that are read to decide."""


@dataclass(frozen=True)
class Greys:
    """What grey values mean."""

    one_object: bool
    """True: from half of `white` on they are object 1. False: they are ids, and white is void."""
    white: int = VOID
    by_colour: bool = False
    """True if palette pictures are read as the greys of their palettes, False if by index."""

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Object ids (H, W) of grey values (H, W)."""
        if self.one_object:
            return (values >= self.white // 2 + 1).astype(np.uint8)
        return np.where(values == self.white, 0, values).astype(values.dtype)


class MaskFiles:
    """The mask files of one video, of one object of a video, or of one folder of stills.

    `masks = MaskFiles(list_pictures(folder)); ids = masks.read(path, size)`. For a file that shows one object (SA-V),
    take `masks.read(path) > 0`. A file alone is `MaskFiles([path])`.

    A palette picture holds ids, 255 is void. A grey picture holds ids, if the files have more than black and white:
    255 is void then. In files of black and white alone, and of black and white with soft edges (blurred, resized, once
    a JPEG), white from 128 on is object 1. What is decided is logged, unless it is ids without void.

    Raises UserError on reading, naming the file, if it is no mask picture, or the files contradict each other.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def read(self, path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
        """Object ids of a mask of `size` (height, width), unsigned integers (H, W), 0 where there is none."""
        values, palette = _read(path)
        if palette is None:
            ids = self.greys.ids(values)
        elif self.greys.by_colour:
            ids = self.greys.ids(palette[values, 0])
        else:
            used = np.unique(values)
            black = used[(palette[used] == 0).all(axis=1)]
            if len(black) and black[0] != 0 and palette[0].any():
                raise UserError(
                    f"{path}: its palette has black at {black[0]} and another colour at 0, but 0 is the background; "
                    "write object ids as pixel values"
                )
            ids = np.where(values == VOID, 0, values).astype(values.dtype)
        return of_size(ids, size, path)

    @cached_property
    def greys(self) -> Greys:
        """Decided by up to 500 of the files, evenly spread; files that cannot be read are left out."""
        return _decide(self._paths[:: -(-len(self._paths) // _PROBED) or 1])


def read_ids(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Object ids (H, W) of a mask file that stands alone; see MaskFiles."""
    return MaskFiles([path]).read(path, size)


def split_ids(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Index mask (H, W) -> {object id: bool (H, W)}, without the background 0."""
    return {int(i): ids == i for i in np.unique(ids) if i != 0}


@dataclass(frozen=True)
class _Counted:
    """The pixel values of a file: which there are, of how many pixels, and how many with four neighbours alike."""

    path: Path
    values: np.ndarray
    pixels: np.ndarray
    inner: np.ndarray

    @classmethod
    def of(cls, path: Path, picture: np.ndarray) -> _Counted:
        pixels = np.bincount(picture.ravel(), minlength=65536)
        alike, middle = np.ones(np.maximum(np.array(picture.shape) - 2, 0), bool), picture[1:-1, 1:-1]
        for neighbour in (picture[:-2, 1:-1], picture[2:, 1:-1], picture[1:-1, :-2], picture[1:-1, 2:]):
            alike &= middle == neighbour
        values = np.flatnonzero(pixels)
        return cls(path, values, pixels[values], np.bincount(middle[alike], minlength=65536)[values])

    def between(self, white: int) -> np.ndarray:
        """The values that are neither black nor white."""
        return self.values[(self.values > 0) & (self.values < white)]

    def is_soft(self, white: int) -> bool:
        """True if its greys are the edges of one white object: most of them have no pixels within a region."""
        solid = (self.inner >= SOLID * self.pixels) & (self.values * VOID < NEAR_WHITE * white)
        grey = (self.values > 0) & (self.values < white)
        soft = self.values[grey & ~solid]
        return len(soft) > (grey & solid).sum() and soft.max() * VOID >= DIMMEST_SOFT * white


def _decide(paths: Sequence[Path]) -> Greys:
    counted, black_and_white, by_colour = [], [], True
    for path in paths:
        try:
            values, palette = _read(path)
        except UserError:
            continue  # raised when it is read itself
        if palette is None:
            counted.append(_Counted.of(path, values))
            continue
        colours = palette[np.unique(values)]
        by_colour &= bool(np.isin(colours, (0, 255)).all() and len(set(map(bytes, colours))) == len(colours))
        by_colour &= bool((colours == colours[:, :1]).all())
        black_and_white.append(path)
    white = 65535 if any(file.values[-1] > VOID for file in counted) else VOID
    by_colour &= bool(black_and_white)
    grey = [file for file in counted if len(file.between(white))]
    soft = [file for file in grey if file.is_soft(white)]
    ids = [file for file in grey if not file.is_soft(white)]
    if soft and ids:
        raise UserError(
            f"{soft[0].path}: is a mask with soft edges, but {ids[0].path} holds ids up to "
            f"{ids[0].between(white)[-1]}; the masks of a video or folder are of one kind"
        )
    if ids:
        has_white = [file for file in counted if file.values[-1] == white]
        lowest, highest = min(f.between(white)[0] for f in ids), max(f.between(white)[-1] for f in ids)
        if has_white and lowest * VOID >= DIMMEST_SOFT * white:
            raise UserError(
                f"{has_white[0].path}: its white may be an object or void beside the greys {lowest} to {highest}; "
                "write objects as 1, 2, ..."
            )
        lossy = [file.path for file in ids if file.path.suffix.lower() in (".jpg", ".jpeg")]
        if lossy:
            raise UserError(f"{lossy[0]}: holds object ids, which JPEG changes; write them as PNG")
        if has_white:
            _say(paths[0].parent, f"masks hold object ids from {lowest} to {highest}, and {white} is void")
        return Greys(False, white)
    if soft:
        _say(paths[0].parent, f"masks have soft edges: each shows one object, where it is {white // 2 + 1} or more")
    elif by_colour or any(file.values[-1] == white for file in counted):
        _say(paths[0].parent, "masks are black and white: each shows one object, the white one")
    return Greys(bool(soft or counted or by_colour), white, by_colour)


@lru_cache(maxsize=4096)
def _say(folder: Path, text: str) -> None:
    """Log once."""
    _log.info("%s: %s", folder, text)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey values or palette indices (H, W), upright; with the palette's colours (256, 3)."""
    with opened(path) as picture:
        picture.verify()  # PIL checks a PNG's checksums only here, and the file must be opened anew
    with opened(path) as picture:
        mode, deep_colour = picture.mode, is_deep_colour(picture)
        values = np.array(upright(picture))
        colours = np.array(picture.getpalette() or [], np.uint8).reshape(-1, 3)
    if mode == "P":
        return values, np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    if mode == "1":
        return values.astype(np.uint8) * np.uint8(VOID), None  # as programs write a grey picture of two values
    if mode in ("LA", "RGBA"):
        if (values[..., -1] != 255).any():
            raise UserError(f"{path}: is a mask with transparent parts (mode {mode}); write it without alpha")
        values = values[..., :-1]
    if mode in ("LA", "RGB", "RGBA") and not deep_colour and (values == values[..., :1]).all():
        return values[..., 0], None
    if mode == "L" or (mode.startswith("I") and values.min() >= 0 and values.max() <= 65535):
        return (values, None) if mode == "L" else (values.astype(np.uint16), None)
    deep = "16-bit " if deep_colour else ""
    raise UserError(
        f"{path}: a mask picture holds one object id a pixel (palette or grey, 8 or 16 bits), "
        f"this one is {deep}{mode}; write it so"
    )
