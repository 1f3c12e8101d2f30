"""Learned steps: LSQ, SEQ, which is LSQ for weights, and LSQ+ with a learned offset.

LSQ: learned step size quantization (Esser et al., arXiv 1902.08153). x^ = s * clip([x/s]; Qn, Qp); gradients of x and s
by eq. 3 and 5, that of s times 1/sqrt(N Qp), N the elements that share s in a weight or in one sample of an activation.
With `range=mean_abs` the first step is the paper's 2 mean|x| / sqrt(Qp); the default, mse, is ours.
Ours: log s is the parameter, so that s > 0 and an optimizer step is relative to s; on an affine grid the zero point is
an integer fixed at calibration, so that the range scales about zero.

SEQ: ParetoQ's stretched elastic quantization (Liu et al., arXiv 2502.02631).
w^ = alpha ([clip(w/alpha; -1, 1) n - 1/2] + 1/2) / n with n = 2^(b-1), alpha learned per row with LSQ's gradients: LSQ
on the mid-rise grid of s = alpha/n. The paper uses it for 2 bits, and LSQ unchanged from 3 bits on, as `grid=auto`
does: the method equals `lsq` with its default grids, restricted to weights.
Ours: alpha starts at the least error, since max|w| (the authors' code, `range=minmax`) is too wide for heavy-tailed
rows; log s is learned; values up to alpha are inside (the code: up to 0.99 alpha); N of the gradient's scale is that of
a row.

LSQ+ (Bhalgat et al., arXiv 2004.09576). Activations: x^ = s * clip([(x - beta)/s]; 0, 2^b - 1) + beta (eq. 2 and 3),
both learned by LSQ's rule; the first s and beta by least error. Weights: LSQ, symmetric, with the first
s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1).
Ours: the offset enters as the zero point [-beta/s], rounded straight through and clipped to the codes, so that zero is
exact and integer runtimes can compute it; d x^/d beta is then 1 where clipped, as in the paper, and d x^/d s differs
from it by the rounding of the zero point. log s is learned, and beta in units of the first range, so that one learning
rate suits activations of all magnitudes. The first error is |.|^2.4, see `ranges`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer, register
from qsam2.quantizers.grid import FARTHEST, bounded_exp
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import initial_bounds
from qsam2.recipe.quantizer_specs import LSQPlusSpec, LSQSpec, Role, SEQSpec

SIGMAS = 3.0


@register(LSQSpec)
@register(SEQSpec)
class LSQQuantizer(Quantizer):
    """Learned `log_scale` (C,), fixed zero point (C,)."""

    statistics = ("fixed_zero_point",)

    spec: LSQSpec | SEQSpec
    fixed_zero_point: Tensor

    def __init__(self, spec: LSQSpec | SEQSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_scale = nn.Parameter(torch.zeros(self.num_channels))

    def _initialize(self, observed: Distribution) -> None:
        if self.spec.range == "mean_abs":
            scale = self.grid.clamp_scale(2.0 * observed.mean_abs / math.sqrt(self.grid.largest_level))
            zero_point = self.grid.zero_point(observed.minimum, scale)
        else:
            scale, zero_point = self.grid.from_bounds(*initial_bounds(observed, self.spec, self.grid))
        self.log_scale.copy_(scale.log())
        self.fixed_zero_point.copy_(zero_point)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        return bounded_exp(self.log_scale), self.fixed_zero_point


@register(LSQPlusSpec)
class LSQPlusQuantizer(Quantizer):
    """Learned `log_scale` (C,); of an activation also `offset` (C,), in units of `first_range` (C,)."""

    statistics = ("first_range",)

    spec: LSQPlusSpec
    first_range: Tensor

    def __init__(self, spec: LSQPlusSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_scale = nn.Parameter(torch.zeros(self.num_channels))
        self.offset = None if self.grid.symmetric else nn.Parameter(torch.zeros(self.num_channels))

    def _initialize(self, observed: Distribution) -> None:
        if self.spec.range == "three_sigma":
            lower, upper = observed.mean - SIGMAS * observed.std, observed.mean + SIGMAS * observed.std
        else:
            lower, upper = initial_bounds(observed, self.spec, self.grid)
        scale, _ = self.grid.from_bounds(lower, upper)
        if self.spec.range == "three_sigma" and self.role == "weight":
            scale = self.grid.clamp_scale(torch.maximum(lower.abs(), upper.abs()) / 2 ** (self.bits - 1))
        self.log_scale.copy_(scale.log())
        self.first_range.copy_(scale * (self.qmax - self.qmin))
        if self.offset is not None:
            self.offset.copy_((lower.clamp(max=0.0) / self.first_range).clamp(min=-FARTHEST))

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        scale = bounded_exp(self.log_scale)
        beta = torch.zeros_like(scale) if self.offset is None else self.offset * self.first_range
        return scale, self.grid.zero_point(beta, scale)
