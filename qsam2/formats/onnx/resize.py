"""Resizing in NumPy that matches PyTorch and Pillow: one matrix for rows, one for columns."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FRACTION = 2.0**22
"""Pillow rounds weights to multiples of 1 / FRACTION."""


@lru_cache(maxsize=32)
def resize_matrix(size: int, new_size: int, *, cubic: bool = False, antialias: bool) -> NDArray[np.float64]:
    """(new_size, size): pixel centres at half coordinates; with `antialias` the kernel is as wide as a new pixel."""
    half_width = 2.0 if cubic else 1.0  # of the kernel, in pixels
    ratio = size / new_size
    stretch = max(ratio, 1.0) if antialias else 1.0
    centres = (np.arange(new_size) + 0.5) * ratio
    if not antialias:  # the border repeats
        centres = centres.clip(0.5, size - 0.5)
    first = np.maximum((centres - half_width * stretch + 0.5).astype(int), 0)
    last = np.minimum((centres + half_width * stretch + 0.5).astype(int), size)
    pixels = np.arange(size)
    x = np.abs((pixels[None] - centres[:, None] + 0.5) / stretch)
    weights = np.maximum(1 - x, 0)
    if cubic:  # Keys' kernel with a = -1/2, which is Pillow's
        outer = np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0)
        weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, outer)
    weights *= (pixels[None] >= first[:, None]) & (pixels[None] < last[:, None])
    return weights / weights.sum(axis=1, keepdims=True)


def resize(x: NDArray[np.float32], height: int, width: int, *, antialias: bool = False) -> NDArray[np.float32]:
    """(..., H, W) to (..., height, width), bilinear: `interpolate(align_corners=False)` of PyTorch."""
    rows = resize_matrix(x.shape[-2], height, antialias=antialias).astype(np.float32)
    columns = resize_matrix(x.shape[-1], width, antialias=antialias).astype(np.float32)
    return np.asarray(rows @ x @ columns.T, np.float32)


def resize_frame(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """RGB uint8 (H, W, 3) to (size, size, 3): Pillow's bicubic, columns, then rows, rounded after each.

    Bit for bit, except for portrait images, which some versions of Pillow resize in the other order.
    """
    height, width, _ = frame.shape
    pixels = frame.transpose(2, 0, 1).astype(np.float64)
    if width != size:
        pixels = _rounded(pixels @ _whole_weights(width, size).T)
    if height != size:
        pixels = _rounded(_whole_weights(height, size) @ pixels)
    return pixels.transpose(1, 2, 0).astype(np.uint8)


def _whole_weights(size: int, new_size: int) -> NDArray[np.float64]:
    weights = resize_matrix(size, new_size, cubic=True, antialias=True) * FRACTION
    return np.trunc(weights + np.copysign(0.5, weights))


def _rounded(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    # whole numbers below 2^53: float64 adds them exactly, in any order
    return np.floor((sums + FRACTION / 2) / FRACTION).clip(0, 255)
