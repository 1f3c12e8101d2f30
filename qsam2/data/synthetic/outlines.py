"""Random irregular outlines: blobs with lobes, corners, limbs, bites and holes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_ANGLES = 1024


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
        length = reach - distance
        direction = 2 * np.pi * angle / _ANGLES
        limb = _limb(rng, angle, length, body)
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


def _limb(rng: np.random.Generator, angle: int, length: float, body: float) -> np.ndarray:
    """Radii of an ellipse around a point of the body's edge, its long axis pointing roughly outwards."""
    long, short = 0.95 * length, max(rng.uniform(0.12, 0.35) * body, 3.0)
    theta = np.arange(_ANGLES) * (2 * np.pi / _ANGLES) - 2 * np.pi * angle / _ANGLES + rng.normal(0, 0.35)
    short = min(short, long)
    return long * short / np.hypot(short * np.cos(theta), long * np.sin(theta))


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
