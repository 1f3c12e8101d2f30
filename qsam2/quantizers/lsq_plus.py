"""LSQ+: learned step and learned offset (Bhalgat et al., arXiv 2004.09576).

Activations: x^ = s * clip([(x - beta)/s]; 0, 2^b - 1) + beta (eq. 2 and 3), both learned by LSQ's rule, times
1/sqrt(N Qp); the first s and beta by least error. Weights: LSQ, symmetric, with the first s = max(|mu - 3 sigma|,
|mu + 3 sigma|) / 2^(b-1).
Ours: the offset enters as the zero point [-beta/s], rounded straight through and clipped to the codes, so that zero is
exact and integer runtimes can compute it; d x^/d beta is then 1 where clipped, as in the paper, and d x^/d s differs
from it by the rounding of the zero point. log s is learned, and beta in units of the first range, so that one learning
rate suits activations of all magnitudes. The first error is |.|^2.4, see `mse`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.grid import bounded_exp
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import LSQPlusSpec, Role

SIGMAS = 3.0


@register(LSQPlusSpec)
class LSQPlusQuantizer(Quantizer):
    """Learned `log_scale` (C,); of an activation also `offset` (C,), in units of `first_range` (C,)."""

    spec: LSQPlusSpec
    first_range: Tensor

    def __init__(self, spec: LSQPlusSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_scale = nn.Parameter(torch.zeros(self.num_channels))
        self.offset = None if self.grid.symmetric else nn.Parameter(torch.zeros(self.num_channels))
        self.register_buffer("first_range", torch.ones(self.num_channels))

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_scale] if self.offset is None else [self.log_scale, self.offset]

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
            self.offset.copy_(lower.clamp(max=0.0) / self.first_range)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        scale = bounded_exp(self.log_scale)
        beta = torch.zeros_like(scale) if self.offset is None else self.offset * self.first_range
        return scale, self.grid.zero_point(beta, scale)
