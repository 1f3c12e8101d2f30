"""Smooth motion and fixed-point image warping: the same pixels on every machine.

Positions are rounded to integers before they touch an image and OpenCV interpolates uint8 images with integer weights,
so a result depends neither on the processor's vector units nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

_BITS = 12  # fraction bits of a position while it is computed
_STEPS = 5  # fraction bits that cv2.remap interpolates with: 1/32 pixel


@dataclass(frozen=True)
class Wave:
    """A smooth random function of time: ``start`` at frame 0, then a drift and a sum of sines."""

    start: float
    drift: float = 0.0
    amplitudes: tuple[float, ...] = ()
    frequencies: tuple[float, ...] = ()  # radians a frame
    phases: tuple[float, ...] = ()

    def __call__(self, time: float) -> float:
        """Value at ``time`` in frames."""
        waves = zip(self.amplitudes, self.frequencies, self.phases, strict=True)
        return self.start + self.drift * time + sum(a * (np.sin(f * time + p) - np.sin(p)) for a, f, p in waves)


def draw_wave(
    rng: np.random.Generator, start: float, reach: float, period: tuple[float, float], drift: float = 0.0
) -> Wave:
    """A random ``Wave`` of two sines that sways about ``reach`` to each side; ``period`` in frames (shortest, longest)."""
    share = rng.uniform(0.55, 0.9)
    periods = rng.uniform(period[0], period[1]), rng.uniform(period[0], period[1]) / 2
    return Wave(
        start,
        drift,
        (reach * share, reach * (1 - share)),
        tuple(2 * np.pi / p for p in periods),
        tuple(rng.uniform(0, 2 * np.pi, 2)),
    )


def similarity(x: float, y: float, angle: float = 0.0, scale: float = 1.0, aspect: float = 1.0) -> np.ndarray:
    """Matrix (3, 3) that stretches x by ``aspect``, scales, turns by ``angle`` radians, then moves by (x, y)."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[aspect * cos, -sin, x], [aspect * sin, cos, y], [0, 0, 1]])


def positions(
    matrix: np.ndarray, size: tuple[int, int], origin: tuple[int, int] = (0, 0)
) -> tuple[np.ndarray, np.ndarray]:
    """Where ``matrix`` (3, 3) takes the pixels of a window: x and y as int32 (height, width) in 1/4096 pixel.

    ``size`` is the window's (height, width) and ``origin`` the (x, y) of its first pixel.
    """
    fixed = np.rint(matrix[:2] * (1 << _BITS)).astype(np.int64)
    us = np.arange(origin[0], origin[0] + size[1])
    vs = np.arange(origin[1], origin[1] + size[0])[:, None]
    x = (fixed[0, 0] * us + fixed[0, 2]).astype(np.int32) + (fixed[0, 1] * vs).astype(np.int32)
    y = (fixed[1, 0] * us + fixed[1, 2]).astype(np.int32) + (fixed[1, 1] * vs).astype(np.int32)
    return x, y


def ripple(
    x: np.ndarray,
    y: np.ndarray,
    size: int,
    reach: tuple[float, float],
    phase: tuple[float, float],
    waves: tuple[float, float],
) -> None:
    """Bends positions in place: x sways as a sine of y and y as a sine of x.

    ``size`` is the side of the square they lie in, ``reach`` the sway in pixels, ``waves`` the number of periods in ``size``.
    """
    along = np.arange(size) * (2 * np.pi / size)
    sway_x = np.rint(reach[0] * (1 << _BITS) * np.sin(waves[0] * along + phase[0])).astype(np.int32)
    sway_y = np.rint(reach[1] * (1 << _BITS) * np.sin(waves[1] * along + phase[1])).astype(np.int32)
    columns = np.clip(x >> _BITS, 0, size - 1)
    x += sway_x[np.clip(y >> _BITS, 0, size - 1)]
    y += sway_y[columns]


def interpolate(image: np.ndarray, x: np.ndarray, y: np.ndarray, border: int = cv2.BORDER_CONSTANT) -> np.ndarray:
    """``image`` (uint8) at positions in 1/4096 pixel, bilinear to 1/32 pixel with integer weights."""
    x, y = x >> (_BITS - _STEPS), y >> (_BITS - _STEPS)
    whole = np.stack([x >> _STEPS, y >> _STEPS], axis=-1).astype(np.int16)
    low = (1 << _STEPS) - 1
    part = (((y & low) << _STEPS) + (x & low)).astype(np.uint16)
    return cv2.remap(image, whole, part, cv2.INTER_LINEAR, borderMode=border)


def sample(
    image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int = cv2.BORDER_CONSTANT
) -> np.ndarray:
    """``image`` (uint8) at the positions where ``matrix`` (3, 3) takes the pixels of a ``size`` window."""
    return interpolate(image, *positions(matrix, size), border)
