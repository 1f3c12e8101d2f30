"""The methods once more, in NumPy and float64, from their definitions: what the tests compare with.

Rows are (C, n), one a channel; scales, zero points, bounds and statistics are (C,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

SAWB = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
    6: (22.41, -24.11),
    7: (27.09, -29.57),
    8: (31.76, -35.04),
}


@dataclass(frozen=True)
class Levels:
    """The codes first..last, the value of code q is scale * (q - zero_point)."""

    bits: int
    symmetric: bool
    mid_rise: bool

    @property
    def first(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def last(self) -> int:
        return self.first + 2**self.bits - 1

    @property
    def largest(self) -> float:
        """Qp of LSQ."""
        return self.last + 0.5 * self.mid_rise

    def cover(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """Scale and zero point, not rounded, of bounds."""
        if self.symmetric:
            parts = 2.0 ** (self.bits - 1) - (not self.mid_rise)
            scale = np.maximum(np.maximum(-lower, upper) / parts, 1e-12)
            return scale, np.full_like(scale, -0.5 * self.mid_rise)
        lower, upper = np.minimum(lower, 0.0), np.maximum(upper, 0.0)
        scale = np.maximum((upper - lower) / self.cells, 1e-12)
        return scale, self.zero(lower, scale)

    @property
    def cells(self) -> int:
        """Steps from bound to bound of an affine grid."""
        return 2**self.bits - (not self.mid_rise)

    def zero(self, lower: Array, scale: Array) -> Array:
        """Zero point of an affine grid, not rounded."""
        return np.clip(-lower / scale, self.first + self.mid_rise, self.last) - 0.5 * self.mid_rise

    def rounded(self, zero_point: Array) -> Array:
        half = 0.5 * self.mid_rise
        return np.round(zero_point + half) - half


def quantize(rows: Array, scale: Array, zero_point: Array, levels: Levels) -> Array:
    """The nearest grid value of each element, by looking at all of them."""
    values = scale[:, None] * (np.arange(levels.first, levels.last + 1) - zero_point[:, None])
    nearest = np.abs(rows[:, :, None] - values[:, None, :]).argmin(axis=2)
    return np.take_along_axis(values, nearest, axis=1)


def as_observed(rows: Array) -> Array:
    """Values as observed: the middle of a bin, 4096 per side up to a power of two, within the extremes."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    width = np.where(largest > 0, 2.0 ** np.frexp(largest)[1], 2.0**-100) / 4096
    return np.clip((np.floor(rows / width) + 0.5) * width, rows.min(axis=1)[:, None], rows.max(axis=1)[:, None])


def percentile(values: Array, percent: float, symmetric: bool) -> tuple[Array, Array]:
    """Bounds by counting: the smallest value that so many per cent do not exceed."""
    rank = max(int(np.ceil(percent / 100.0 * values.shape[1] - 1e-9)), 1) - 1
    if symmetric:
        bound = np.sort(np.abs(values), axis=1)[:, rank]
        return -bound, bound
    return np.minimum(-np.sort(-values, axis=1)[:, rank], 0.0), np.maximum(np.sort(values, axis=1)[:, rank], 0.0)


def clipping_error(values: Array, scale: Array, zero_point: Array, levels: Levels) -> Array:
    """Sum of |Q(x) - x|^2.4; the zero point comes not rounded."""
    zero_point = levels.rounded(zero_point)
    return (np.abs(quantize(values, scale, zero_point, levels) - values) ** 2.4).sum(axis=1)


def divergence(values: Array, lower: float, upper: float, levels: Levels) -> float:
    """TensorRT's criterion for one row: bin by bin, cell by cell. Infinite for fewer bins than cells, 1 % clipped."""
    width = 2.0 ** np.frexp(np.abs(values).max())[1] / 2048
    zero, cells = (0, 2 ** (levels.bits - 1)) if levels.symmetric else (2048, 2**levels.bits)
    seen = np.abs(values) if levels.symmetric else values
    counts = np.bincount(np.clip(np.floor(seen / width).astype(int) + zero, 0, zero + 2047), minlength=zero + 2048)
    counts[zero] = counts[zero + 1]
    first = 0 if levels.symmetric else max(zero + int(np.floor(lower / width)), 0)
    end = min(zero + int(np.ceil((max(-lower, upper) if levels.symmetric else upper) / width)), zero + 2048)
    if end - first < cells or counts[first:end].sum() < 0.99 * counts.sum():
        return np.inf
    reference = counts[first:end].astype(float)
    reference[0] += counts[:first].sum()
    reference[-1] += counts[end:].sum()
    cell = np.arange(end - first) * cells // (end - first)
    mass = np.bincount(cell, weights=counts[first:end], minlength=cells)
    filled = np.bincount(cell, weights=reference > 0, minlength=cells)
    candidate = np.where(reference > 0, (mass / np.maximum(filled, 1))[cell], 0.0)
    p, q = reference / reference.sum(), candidate / candidate.sum()
    with np.errstate(divide="ignore"):
        return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@dataclass(frozen=True)
class Gradients:
    """Gradients of sum(upstream * output): to x (C, n), to the scale and the zero point (C,)."""

    x: Array
    scale: Array
    zero_point: Array


def gradients(
    rows: Array,
    upstream: Array,
    scale: Array,
    zero_point: Array,
    levels: Levels,
    *,
    samples: int,
    identity: bool,
    residual: bool,
) -> Gradients:
    """LSQ's rule element by element; PACT's without the residual. Scaled by 1/sqrt(N Qp), N a sample's elements."""
    half = 0.5 * levels.mid_rise
    gain = 1.0 / np.sqrt(max(rows.shape[1] // samples, 1) * levels.largest)
    grad_x, grad_scale, grad_zero_point = np.zeros_like(rows), np.zeros(len(rows)), np.zeros(len(rows))
    for c, i in np.ndindex(*rows.shape):
        s, z = scale[c], zero_point[c]
        t, low, high = rows[c, i] / s, levels.first - z, levels.last - z
        if low - half <= t <= high + half:
            grad_x[c, i] = upstream[c, i]
            level = np.clip(np.round(t - half) + half, low, high)
            grad_scale[c] += residual * upstream[c, i] * (level - t)
        else:
            grad_x[c, i] = identity * upstream[c, i]
            grad_scale[c] += upstream[c, i] * (low if t < low else high)
            grad_zero_point[c] -= upstream[c, i] * s
    return Gradients(grad_x, gain * grad_scale, gain * grad_zero_point)
