"""Mask pictures -> object ids. What their pixel values mean is decided once for all files of a video or folder.

One picture cannot tell: a frame of 0 and 255 shows one object in DAVIS-2016, and only the void border where an object
has left the view in a set of grey ids.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import get_worker_info

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
RISING = 0.25
"""Share of the pixels of soft edges that have a brighter neighbour; of scattered ids of a few pixels they have none."""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_PROBED = 500
"""Most files that are read to decide."""


@dataclass(frozen=True)
class Greys:
    """Meaning of the grey values of mask files."""

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
    take `masks.read(path) > 0`. A file alone is `MaskFiles([path])`. `place` is the folder of the dataset, for the log.

    A palette picture holds ids, 255 is void. A grey picture holds ids, if the files have more than black and white:
    255 is void then. In files of black and white alone, and of black and white with soft edges (blurred, resized, once
    a JPEG), white from 128 on is object 1. What is decided on greys is logged.

    Raises UserError on reading, naming the file, if it is no mask picture, or the files contradict each other.
    """

    def __init__(self, paths: Sequence[Path], place: Path | None = None) -> None:
        self._paths, self._place = paths, place

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
        greys, text = _decide(self._paths[:: -(-len(self._paths) // _PROBED) or 1])
        if text:
            folder = self._paths[0].parent
            _say(self._place or folder, text, folder.name)
        return greys


def read_ids(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Object ids (H, W) of a mask file that stands alone; see MaskFiles."""
    return MaskFiles([path]).read(path, size)


def split_ids(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Index mask (H, W) -> {object id: bool (H, W)}, without the background 0."""
    return {int(i): ids == i for i in np.unique(ids) if i != 0}


@dataclass(frozen=True, eq=False)
class _Counted:
    """Pixel values of a file, and of how many pixels each: all, within a region, and beside a brighter one."""

    path: Path
    values: np.ndarray
    pixels: np.ndarray
    inner: np.ndarray
    beside_brighter: np.ndarray

    @classmethod
    def of(cls, path: Path, picture: np.ndarray) -> _Counted:
        pixels = _histogram(picture)
        values = np.flatnonzero(pixels)
        if set(values) <= {0, VOID}:
            return cls(path, values, pixels[values], *np.zeros((2, len(values)), np.int64))
        middle = picture[1:-1, 1:-1]
        alike = np.ones(middle.shape, bool)
        for neighbour in (picture[:-2, 1:-1], picture[2:, 1:-1], picture[1:-1, :-2], picture[1:-1, 2:]):
            alike &= middle == neighbour
        darker = picture[cv2.dilate(picture, np.ones((3, 3))) > picture]
        return cls(path, values, pixels[values], _histogram(middle[alike])[values], _histogram(darker)[values])

    def greys(self, white: int) -> np.ndarray:
        """The values that are neither black nor white."""
        return self.values[(self.values > 0) & (self.values < white)]

    def meaning(self, white: int) -> str:
        """Kind of its greys: ``ids``, the edges of a ``soft`` object, or "" if it has none or too few to tell.

        Ids have pixels within their regions. Soft edges have none, but brighter ones beside theirs.
        """
        solid = (self.inner >= SOLID * self.pixels) & (self.values * VOID < NEAR_WHITE * white)
        grey = (self.values > 0) & (self.values < white)
        edge = grey & ~solid
        if edge.sum() > (grey & solid).sum() and self.values[edge].max() * VOID >= DIMMEST_SOFT * white:
            between = edge & (self.values * VOID < NEAR_WHITE * white)
            is_dim = self.values[between].max(initial=0) * VOID < DIMMEST_SOFT * white
            is_rising = self.beside_brighter[between].sum() >= RISING * self.pixels[between].sum()
            return "soft" if is_dim or is_rising else "ids"
        return "ids" if (grey & solid).any() else ""


def _histogram(values: np.ndarray) -> np.ndarray:
    """Pixels of each value up to 65535; in parts, as NumPy converts values to 64 bits."""
    parts = np.array_split(values.ravel(), values.size // 2**24 + 1)
    return np.sum([np.bincount(part, minlength=65536) for part in parts], axis=0)


def _decide(paths: Sequence[Path]) -> tuple[Greys, str]:
    """Meaning of the greys of some files, and a line about it for the log ("" if there are none)."""
    counted, palettes = [], []
    for path in paths:
        try:
            values, palette = _read(path)
        except UserError:
            continue  # raised when it is read itself
        if palette is None:
            counted.append(_Counted.of(path, values))
        else:
            palettes.append({int(index): tuple(palette[index].tolist()) for index in np.unique(values)})
    # black and white that a program saved with a palette: white would be void, or the background
    by_colour = any(used.get(index) == _WHITE for used in palettes for index in (0, VOID)) and all(
        set(used.values()) <= {_BLACK, _WHITE} and len(set(used.values())) == len(used) for used in palettes
    )
    white = 65535 if any(file.values[-1] > VOID for file in counted) else VOID
    kinds = {file: file.meaning(white) for file in counted}
    ids = [file for file, kind in kinds.items() if kind == "ids"]
    soft = [file for file, kind in kinds.items() if kind == "soft"]
    whites = [file for file in counted if file.values[-1] == white]
    if soft and ids:
        raise UserError(
            f"{soft[0].path}: is a mask with soft edges, but {ids[0].path} holds ids up to {ids[0].greys(white)[-1]}; "
            "the masks of a video or folder are of one kind"
        )
    greys = [file for file in counted if len(file.greys(white))]
    if ids or (greys and not soft and not any(file in whites for file in greys)):
        lossy = [file.path for file in greys if file.path.suffix.lower() in (".jpg", ".jpeg")]
        if lossy:
            raise UserError(f"{lossy[0]}: holds object ids, which JPEG changes; write them as PNG")
        lowest, highest = (
            min(file.greys(white)[0] for file in ids or greys),
            max(file.greys(white)[-1] for file in greys),
        )
        if whites and lowest * VOID >= DIMMEST_SOFT * white:
            raise UserError(
                f"{whites[0].path}: its white may be an object, or void beside the greys {lowest} to {highest}; "
                "write objects as 1, 2, ..."
            )
        return Greys(False, white), f"the greys of masks are object ids{f', and {white} is void' if whites else ''}"
    text = ""
    if greys:
        text = f"the masks are grey with soft edges: each shows one object, from {white // 2 + 1} of {white} on"
    elif whites or by_colour:
        text = "the masks are black and white: each shows one object, the white one"
    return Greys(bool(counted or by_colour), white, by_colour), text


_said: set[tuple[Path, str]] = set()


def _say(place: Path, text: str, example: str) -> None:
    """Log once for a place; of loader workers the first."""
    worker = get_worker_info()
    if (place, text) not in _said and (worker is None or worker.id == 0):
        _said.add((place, text))
        _log.info("%s: %s (%s, ...)", place, text, example)


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
        return values[..., 0].copy(), None
    if mode == "L" or (mode.startswith("I") and values.min() >= 0 and values.max() <= 65535):
        return (values, None) if mode == "L" else (values.astype(np.uint16), None)
    deep = "16-bit " if deep_colour else ""
    raise UserError(
        f"{path}: a mask picture holds one object id a pixel, as palette or grey of 8 or 16 bits; "
        f"this one is {deep}{mode}"
    )
