"""Uniform grids: the integers of a quantizer, and the step and zero point that cover a range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qsam2.recipe.quantizer_specs import QuantizerSpec

SMALLEST_SCALE = 1e-12  # float32 values divided by it stay finite up to 3e26
LARGEST_SCALE = 1e30
FARTHEST = 1e6  # steps from zero, so that a learned bound far off the grid stays finite


def round_through(x: Tensor, low: int, high: int) -> Tensor:
    """Round half to even and clip, with gradient 1 (straight-through estimator). The result is an exact integer."""
    return x.detach().round().clamp(low, high) + (x - x.detach())


def bounded_exp(log: Tensor) -> Tensor:
    """exp(log), clamped so that value and gradient are positive and finite for any `log`."""
    return log.clamp(math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE)).exp()


@dataclass(frozen=True)
class Grid:
    """Codes qmin..qmax (int); a code q stands for the value scale * (q - zero_point).

    Symmetric mid-tread: -2^(b-1)..2^(b-1)-1, zero point 0. Symmetric mid-rise: the same codes, zero point -0.5, so that
    values are odd multiples of scale/2. Affine: 0..2^b-1, integer zero point among the codes; mid-rise (ours): zero
    point half-way between two codes, values again odd multiples of scale/2.
    """

    bits: int
    symmetric: bool
    mid_rise: bool

    @classmethod
    def of(cls, spec: QuantizerSpec) -> Grid:
        """Grid of a spec that `for_role` has resolved."""
        assert spec.symmetric is not None and spec.grid != "auto", f"spec is not resolved, call for_role first: {spec}"
        return cls(spec.bits, spec.symmetric, spec.grid == "mid_rise")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    @property
    def largest_level(self) -> float:
        """Qp of LSQ, in steps: qmax, or qmax + 1/2 on a mid-rise grid."""
        return self.qmax + 0.5 if self.mid_rise else float(self.qmax)

    def from_bounds(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float (C,), that cover [lower, upper] (C,); differentiable in both.

        Symmetric: the larger of |lower|, |upper| falls on qmax (mid-rise: on the outer edge of the last cell).
        Affine: the range is widened to contain zero, as integer runtimes need, and the zero point is rounded (STE);
        mid-rise: its ends also fall on the outer edges of the outer cells.
        """
        if not self.symmetric:
            lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)
        reach = torch.maximum(-lower, upper) if self.symmetric else upper - lower
        scale = self.clamp_scale(reach / (self.qmax + 1 if self.mid_rise else self.qmax))
        return scale, self.zero_point(lower, scale)

    def zero_point(self, lower: Tensor, scale: Tensor) -> Tensor:
        """Zero point (C,); affine: the code of zero if `lower` falls on qmin, rounded and clipped (STE).

        Mid-rise: half-way between two codes, with `lower` on the outer edge of qmin's cell.
        """
        if self.symmetric:
            return torch.full_like(scale, -0.5 if self.mid_rise else 0.0, requires_grad=False)
        zero = (-lower / scale).clamp(-FARTHEST, FARTHEST)
        return round_through(zero, 1, self.qmax) - 0.5 if self.mid_rise else round_through(zero, self.qmin, self.qmax)

    @staticmethod
    def clamp_scale(scale: Tensor) -> Tensor:
        """Clamp a scale to positive finite values (an all-zero channel gets the smallest one)."""
        return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)
