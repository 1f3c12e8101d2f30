"""Smooth motion and fixed-point image warping, with identical pixels on every machine.

Matrices and positions are rounded to a fixed grid before they are applied to an image, and OpenCV interpolates uint8
images with integer weights: results depend neither on the processor's vector units nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np

_BITS = 16  # fraction bits of a position while it is computed
_STEPS = 5  # fraction bits that cv2.remap interpolates with: 1/32 pixel


@dataclass(frozen=True)
class Wave:
    """A smooth function of time: ``start`` at frame 0, then a drift and a sum of sines."""

    start: float
    drift: float = 0.0
    amplitudes: tuple[float, ...] = ()
    frequencies: tuple[float, ...] = ()  # radians per frame
    phases: tuple[float, ...] = ()

    @classmethod
    def draw(
        cls, rng: np.random.Generator, start: float, reach: float, period: tuple[float, float], drift: float = 0.0
    ) -> Wave:
        """A random wave of two sines with amplitude ``reach``; ``period`` is (shortest, longest) in frames."""
        share = rng.uniform(0.7, 0.95)
        long, short = rng.uniform(*period), rng.uniform(*period) / 2
        amplitudes, frequencies = (reach * share, reach * (1 - share)), (2 * np.pi / long, 2 * np.pi / short)
        return cls(start, drift, amplitudes, frequencies, tuple(rng.uniform(0, 2 * np.pi, 2)))

    def __call__(self, time: float) -> float:
        """Value at ``time`` in frames."""
        waves = zip(self.amplitudes, self.frequencies, self.phases, strict=True)
        return self.start + self.drift * time + sum(a * (np.sin(f * time + p) - np.sin(p)) for a, f, p in waves)

    def __add__(self, other: Wave) -> Wave:
        return Wave(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Bend:
    """A wave along the outline: ``reach`` as share of the picture, phases (radians) and periods in x and y."""

    reach: float
    phases: tuple[Wave, Wave]
    waves: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator, reach: float) -> Bend:
        """A random wave that moves along the outline."""
        first, second = (
            Wave.draw(rng, start, rng.uniform(0.3, 1.5), (12, 40), rng.normal(0, 0.1))
            for start in rng.uniform(0, 2 * np.pi, 2)
        )
        return cls(reach, (first, second), (rng.uniform(0.5, 1.6), rng.uniform(0.5, 1.6)))

    def displace(self, x: np.ndarray, y: np.ndarray, size: tuple[int, int], time: float) -> None:
        """Displace positions in a picture of ``size`` (height, width) in place: x by a sine of y, y by a sine of x."""
        reach = self.reach * size[1], self.reach * size[0]
        sway_x, sway_y = (
            np.rint(reach[axis] * (1 << _BITS) * np.sin(np.arange(side) * (2 * np.pi * waves / side) + phase(time)))
            for axis, (side, waves, phase) in enumerate(zip(size, self.waves, self.phases, strict=True))
        )
        columns = np.clip(x >> _BITS, 0, size[1] - 1)
        x += sway_x.astype(np.int32)[np.clip(y >> _BITS, 0, size[0] - 1)]
        y += sway_y.astype(np.int32)[columns]


def similarity(x: float, y: float, angle: float = 0.0, scale: float = 1.0, aspect: float = 1.0) -> np.ndarray:
    """Matrix (3, 3) that stretches x by ``aspect``, scales, turns by ``angle`` radians, then moves by (x, y)."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[aspect * cos, -sin, x], [aspect * sin, cos, y], [0, 0, 1]])


def project(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a projective ``matrix`` (3, 3) to points (n, 2) as (x, y)."""
    homogeneous = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def corners(height: float, width: float, margin: float = 0.0) -> np.ndarray:
    """The four corners (4, 2) as (x, y) of a (height, width) window that is wider by ``margin`` on each side."""
    low, right, bottom = -margin, width + margin, height + margin
    return np.array([[low, low], [right, low], [right, bottom], [low, bottom]])


def positions(
    matrix: np.ndarray, size: tuple[int, int], origin: tuple[int, int] = (0, 0)
) -> tuple[np.ndarray, np.ndarray]:
    """Apply ``matrix`` (3, 3) to the pixels of a window: x and y as int32 (height, width) in 1/65536 pixel.

    ``size`` is the window's (height, width) and ``origin`` the (x, y) of its first pixel. The last element of
    ``matrix`` must not be 0.
    """
    matrix = matrix / matrix[2, 2]
    fixed = np.rint(matrix[:2] * (1 << _BITS))
    us = np.arange(origin[0], origin[0] + size[1])
    vs = np.arange(origin[1], origin[1] + size[0])[:, None]
    tilt = np.rint(matrix[2, :2] * 2.0**40) / 2.0**40
    if tilt.any():
        depth = tilt[0] * us + tilt[1] * vs + 1
        x, y = ((row[0] * us + row[1] * vs + row[2]) / depth for row in fixed)
        return np.rint(x).astype(np.int32), np.rint(y).astype(np.int32)
    x, y = ((row[0] * us + row[2]).astype(np.int32) + (row[1] * vs).astype(np.int32) for row in fixed)
    return x, y


def interpolate(image: np.ndarray, x: np.ndarray, y: np.ndarray, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """``image`` (uint8) at positions in 1/65536 pixel, bilinear to 1/32 pixel with integer weights."""
    x, y = x >> (_BITS - _STEPS), y >> (_BITS - _STEPS)
    whole = np.stack([x >> _STEPS, y >> _STEPS], axis=-1).astype(np.int16)
    low = (1 << _STEPS) - 1
    part = (((y & low) << _STEPS) + (x & low)).astype(np.uint16)
    return cv2.remap(image, whole, part, cv2.INTER_LINEAR, borderMode=border)


def nearest(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``image`` (height, width) at the pixels nearest to positions in 1/65536 pixel, with repeated edges."""
    half = 1 << (_BITS - 1)
    columns = np.clip((x + half) >> _BITS, 0, image.shape[1] - 1)
    return image[np.clip((y + half) >> _BITS, 0, image.shape[0] - 1), columns]


def halve(image: np.ndarray) -> np.ndarray:
    """``image`` (uint8 (H, W, C)) at half its size, each pixel the rounded mean of four; odd last lines are dropped."""
    fine = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2].astype(np.uint16)
    total = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)
