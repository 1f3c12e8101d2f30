"""Resizing in NumPy, as PyTorch and Pillow do it: a matrix for the rows, another for the columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Filter = Literal["linear", "cubic"]


def _linear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -1/2, which is Pillow's."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


KERNELS: dict[Filter, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], float]] = {
    "linear": (_linear, 1.0),
    "cubic": (_cubic, 2.0),
}
"""Function and half its width, in pixels."""


@lru_cache(maxsize=32)
def resize_matrix(size: int, new_size: int, kernel: Filter, antialias: bool) -> NDArray[np.float32]:
    """(new_size, size): pixel centres at half coordinates; with `antialias` the kernel is as wide as a new pixel."""
    function, half_width = KERNELS[kernel]
    ratio = size / new_size
    stretch = max(ratio, 1.0) if antialias else 1.0
    centres = (np.arange(new_size) + 0.5) * ratio
    if not antialias:  # the border repeats
        centres = centres.clip(0.5, size - 0.5)
    first = np.maximum((centres - half_width * stretch + 0.5).astype(int), 0)
    last = np.minimum((centres + half_width * stretch + 0.5).astype(int), size)
    pixels = np.arange(size)
    weights = function((pixels[None] - centres[:, None] + 0.5) / stretch)
    weights *= (pixels[None] >= first[:, None]) & (pixels[None] < last[:, None])
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize(x: NDArray[np.float32], height: int, width: int, *, antialias: bool = False) -> NDArray[np.float32]:
    """(..., H, W) to (..., height, width), bilinear: `interpolate(align_corners=False)` of PyTorch."""
    rows = resize_matrix(x.shape[-2], height, "linear", antialias)
    columns = resize_matrix(x.shape[-1], width, "linear", antialias)
    return np.asarray(rows @ x @ columns.T, np.float32)


def resize_frame(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """RGB uint8 (H, W, 3) to (size, size, 3): Pillow's bicubic, which rounds after the columns and after the rows."""
    height, width, _ = frame.shape
    pixels = frame.astype(np.float32)
    if width != size:
        columns = resize_matrix(width, size, "cubic", True)
        pixels = _rounded(np.einsum("xw,hwc->hxc", columns, pixels, optimize=True))
    if height != size:
        pixels = _rounded(np.einsum("yh,hxc->yxc", resize_matrix(height, size, "cubic", True), pixels, optimize=True))
    return pixels.astype(np.uint8)


def _rounded(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.floor(pixels + 0.5).clip(0, 255)
