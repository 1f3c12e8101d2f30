"""Texture patches cut from the photographs that scikit-image carries inside its package; nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files

import cv2
import numpy as np
from PIL import Image

from qsam2.data.warps import sample, similarity
from qsam2.errors import UserError

# Only PNG files: a JPEG may decode to other values with another libjpeg, and the videos must be the same everywhere.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "text.png",
)
_GREY = {"brick.png", "camera.png", "cell.png", "clock_motion.png", "coins.png", "grass.png", "gravel.png"} | {
    "moon.png",
    "page.png",
    "text.png",
}


@lru_cache(maxsize=1)
def photographs() -> tuple[tuple[np.ndarray, ...], ...]:
    """The photographs, each as a pyramid of RGB uint8 images that halve in size; read once a process."""
    return tuple(_pyramid(_read(name)) for name in PHOTOGRAPHS)


def cut(rng: np.random.Generator, height: int, width: int, photo: int | None = None) -> np.ndarray:
    """A random patch as RGB uint8 (height, width, 3): turned, mirrored, scaled and recoloured.

    ``photo`` indexes ``PHOTOGRAPHS``; a random one when it is None.
    """
    photo = int(rng.integers(len(PHOTOGRAPHS))) if photo is None else photo
    pyramid = photographs()[photo]
    side = min(pyramid[0].shape[:2])
    zoom = 2 ** rng.uniform(-1.5, min(1.5, np.log2(side / max(height, width))) if side > max(height, width) else -0.5)
    level = min(max(int(np.floor(np.log2(zoom))), 0), len(pyramid) - 1)
    image = pyramid[level]
    zoom /= 2**level  # pixels of this level for one pixel of the patch
    centre = rng.uniform(0.2, 0.8, 2) * (image.shape[1], image.shape[0])
    matrix = similarity(centre[0], centre[1], rng.uniform(-np.pi, np.pi), zoom) @ similarity(-width / 2, -height / 2)
    if rng.random() < 0.5:
        matrix[:, 0] *= -1
        matrix[:, 2] = [*(matrix @ (-width, 0, 1))[:2], 1]
    return recolour(
        rng, sample(image, matrix, (height, width), border=cv2.BORDER_REFLECT_101), PHOTOGRAPHS[photo] in _GREY
    )


def recolour(rng: np.random.Generator, image: np.ndarray, grey: bool) -> np.ndarray:
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
    return np.stack([table[image[..., source], channel] for channel, source in enumerate(order)], axis=-1)


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
        fine = levels[-1].astype(np.uint16)
        height, width = fine.shape[0] // 2 * 2, fine.shape[1] // 2 * 2
        fine = fine[:height, :width]
        total = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
        levels.append(((total + 2) >> 2).astype(np.uint8))
    return tuple(levels)
