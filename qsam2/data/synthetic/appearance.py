"""Looks of generated objects: random outlines, and textures from photographs.

The photographs are those inside the scikit-image package; nothing is downloaded.
"""

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
_ANGLES = 1024  # directions of an outline


@lru_cache(maxsize=1)
def photographs() -> tuple[tuple[np.ndarray, ...], ...]:
    """The photographs, each as a pyramid of RGB uint8 images that halve in size; read once per process."""
    pyramids = []
    for name in PHOTOGRAPHS:
        levels = [_read(f"{name}.png")]
        while min(levels[-1].shape[:2]) >= 128:
            levels.append(halve(levels[-1]))
        pyramids.append(tuple(levels))
    return tuple(pyramids)


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
    upright = rng.random() < 0.6  # nearly, as in photographs; else any direction
    angle = rng.normal(0, 0.2) if upright else rng.uniform(-np.pi, np.pi)
    matrix = similarity(centre[0], centre[1], angle, zoom) @ mirror @ similarity(-width / 2, -height / 2)
    patch = interpolate(image, *positions(matrix, (height, width)), cv2.BORDER_REFLECT_101)
    return _recolour(rng, patch, PHOTOGRAPHS[photo] in _GREY)


def smooth_patch(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A patch without texture, RGB uint8 (height, width, 3): a smooth gradient between colours of a photograph."""
    coarse = texture_patch(rng, 5, 5)
    return interpolate(coarse, *positions(np.diag([4 / width, 4 / height, 1]), (height, width)))


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
        with as_file(files("skimage") / "data" / name) as path, Image.open(path, formats=("PNG",)) as image:
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(
            f"scikit-image: the installed package lacks data/{name}, which moving objects are made of; "
            "install it anew with pip install --force-reinstall scikit-image"
        ) from error


def draw_outline(rng: np.random.Generator, side: int) -> np.ndarray:
    """Opacity of a random shape that fills its canvas, uint8 (side, side): 0 outside, 255 inside, soft edges."""
    fine = 2 * side  # two samples a pixel each way, for the soft edge
    reach = fine / 2 - 4
    parts = int(rng.choice(4, p=(0.45, 0.25, 0.2, 0.1)))
    body = reach * (rng.uniform(0.5, 0.75) if parts else 1.0)
    radii = _radii(rng)
    inside = _blob(fine, 0, 0, radii * (body / radii.max()))
    for _ in range(parts):
        angle = int(rng.integers(_ANGLES))
        distance = float(radii[angle] / radii.max()) * body
        direction = 2 * np.pi * angle / _ANGLES
        # an ellipse around a point of the body's edge, its long axis pointing roughly outwards
        long = 0.95 * (reach - distance)
        short = min(max(rng.uniform(0.12, 0.35) * body, 3.0), long)
        theta = np.arange(_ANGLES) * (2 * np.pi / _ANGLES) - direction + rng.normal(0, 0.35)
        limb = long * short / np.hypot(short * np.cos(theta), long * np.sin(theta))
        inside |= _blob(fine, round(distance * np.cos(direction)), round(distance * np.sin(direction)), limb)
    if rng.random() < 0.15:  # a bite or a hole
        turn, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.9) * body
        bite = _radii(rng)
        bite *= rng.uniform(0.2, 0.4) * body / bite.max()
        inside &= ~_blob(fine, round(distance * np.cos(turn)), round(distance * np.sin(turn)), bite)
    quarters = inside[::2, ::2].astype(np.uint16) + inside[1::2, ::2] + inside[::2, 1::2] + inside[1::2, 1::2]
    return np.minimum(quarters * 64, 255).astype(np.uint8)


def _radii(rng: np.random.Generator) -> np.ndarray:
    """A closed outline as its radius in ``_ANGLES`` directions, positive, (1024,)."""
    theta = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    kind = rng.random()
    if kind < 0.6:  # smooth lobes
        orders = np.arange(2, 8)
        weights = rng.normal(0, 1, 6) * rng.uniform(0.1, 0.45) / (orders - 1)
        radii = 1 + (weights[:, None] * np.cos(orders[:, None] * theta + rng.uniform(0, 2 * np.pi, 6)[:, None])).sum(0)
        return np.clip(radii, 0.3, None)
    if kind < 0.85:  # a polygon: the nearest of its straight sides
        sides = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(4, 9))))
        sides = np.concatenate([sides, np.arange(4) * (np.pi / 2) + rng.uniform(0, np.pi / 2)])
        cosines = np.cos(theta[:, None] - sides)
        near = rng.uniform(0.6, 1.0, len(sides))
        return np.where(cosines > 0.05, near / np.maximum(cosines, 0.05), 9.0).min(1)
    points = rng.integers(3, 8)  # a star or a flower
    return 1 + rng.uniform(0.15, 0.45) * np.cos(points * theta + rng.uniform(0, 2 * np.pi))


def _blob(side: int, x: int, y: int, radii: np.ndarray) -> np.ndarray:
    """Samples within ``radii`` of the point (x, y), relative to the middle; bool (side, side)."""
    direction, squared = _polar(side)
    rows, columns = slice(side - side // 2 - y, None), slice(side - side // 2 - x, None)
    limit = np.rint(radii * radii).astype(np.int32)
    return squared[rows, columns][:side, :side] < limit[direction[rows, columns][:side, :side]]


@lru_cache(maxsize=16)
def _polar(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Direction (in 1/1024 turn) and squared distance from the middle of a (2 side, 2 side) grid, as integers."""
    offset = np.arange(2 * side) - side
    x, y = offset[None], offset[:, None]
    direction = np.rint(np.arctan2(y, x) * (_ANGLES / (2 * np.pi))).astype(np.int32) % _ANGLES
    return direction.astype(np.int16), (x * x + y * y).astype(np.int32)
