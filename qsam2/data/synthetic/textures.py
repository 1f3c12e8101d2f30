"""Texture patches from the photographs inside the scikit-image package; nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files

import cv2
import numpy as np
from PIL import Image

from qsam2.data.synthetic.warps import halve, interpolate, positions, similarity
from qsam2.errors import UserError

# Only PNG files: a JPEG may decode to other values with another libjpeg, and the videos must be the same everywhere.
_COLOURED = ("astronaut", "chelsea", "coffee", "color", "ihc", "motorcycle_left")
_GREY = ("brick", "camera", "cell", "clock_motion", "coins", "grass", "gravel", "moon", "page", "text")
PHOTOGRAPHS = _COLOURED + _GREY


@lru_cache(maxsize=1)
def photographs() -> tuple[tuple[np.ndarray, ...], ...]:
    """The photographs, each as a pyramid of RGB uint8 images that halve in size; read once per process.

    Raises:
        UserError: the installed scikit-image lacks one of them.
    """
    return tuple(_pyramid(_read(f"{name}.png")) for name in PHOTOGRAPHS)


def texture_patch(rng: np.random.Generator, height: int, width: int, photo: int | None = None) -> np.ndarray:
    """A random patch as RGB uint8 (height, width, 3): turned, mirrored, scaled and recoloured.

    ``photo`` indexes ``PHOTOGRAPHS``, None for a random one. A photograph smaller than the patch is magnified and
    mirrored at its edges.
    """
    photo = int(rng.integers(len(PHOTOGRAPHS))) if photo is None else photo
    pyramid = photographs()[photo]
    longest = max(height, width)
    largest = min(1.5, np.log2(min(pyramid[0].shape[:2]) / longest) + 0.3)
    zoom = 2 ** rng.uniform(min(-1.0, largest - 1), largest)
    level = min(max(int(np.floor(np.log2(zoom))), 0), len(pyramid) - 1)
    zoom /= 2**level  # pixels of this level for one pixel of the patch
    image = pyramid[level]
    sides = np.array(image.shape[1::-1])
    centre = sides / 2 + rng.uniform(-0.5, 0.5, 2) * np.maximum(sides - zoom * longest, 0)
    mirror = np.diag([rng.choice((-1.0, 1.0)), 1.0, 1.0])
    matrix = similarity(centre[0], centre[1], _angle(rng), zoom) @ mirror @ similarity(-width / 2, -height / 2)
    patch = interpolate(image, *positions(matrix, (height, width)), cv2.BORDER_REFLECT_101)
    return _recolour(rng, patch, PHOTOGRAPHS[photo] in _GREY)


def smooth_patch(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A patch without texture, RGB uint8 (height, width, 3): a smooth gradient between colours of a photograph."""
    coarse = texture_patch(rng, 5, 5)
    return interpolate(coarse, *positions(np.diag([4 / width, 4 / height, 1]), (height, width)))


def _angle(rng: np.random.Generator) -> float:
    """A rotation in radians: mostly nearly upright, as in photographs, sometimes any direction."""
    return rng.normal(0, 0.2) if rng.random() < 0.6 else rng.uniform(-np.pi, np.pi)


def _recolour(rng: np.random.Generator, image: np.ndarray, grey: bool) -> np.ndarray:
    """``image`` with random contrast, gamma and channel order; a ``grey`` one gets a tint between two colours."""
    levels = np.arange(256) / 255
    curve = levels ** (2 ** rng.uniform(-0.7, 0.7))
    if grey and rng.random() < 0.7:
        dark, light = rng.uniform(0, 0.45, 3), rng.uniform(0.5, 1.0, 3)
    else:
        dark, light = np.full(3, rng.uniform(0, 0.3)), rng.uniform(0.7, 1.0) * rng.uniform(0.8, 1.0, 3)
    if rng.random() < 0.15:
        dark, light = light, dark
    table = np.rint(255 * (dark + (light - dark) * curve[:, None])).astype(np.uint8)  # (256, 3)
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    return np.stack([cv2.LUT(image[..., source], table[:, channel]) for channel, source in enumerate(order)], axis=-1)


def _read(name: str) -> np.ndarray:
    try:
        with as_file(files("skimage") / "data" / name) as path, Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(
            f"scikit-image: the installed package lacks data/{name}, which moving objects are made of; "
            "install it anew with pip install --force-reinstall scikit-image"
        ) from error


def _pyramid(image: np.ndarray) -> tuple[np.ndarray, ...]:
    levels = [image]
    while min(levels[-1].shape[:2]) >= 128:
        levels.append(halve(levels[-1]))
    return tuple(levels)
