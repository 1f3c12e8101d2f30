"""LSQ: learned step size quantization (Esser et al., arXiv 1902.08153).

x^ = s * clip([x/s]; Qn, Qp); gradients of x and s by eq. 3 and 5, that of s times 1/sqrt(N Qp), N the elements that
share s in a weight or in one sample of an activation. With `range=mean_abs` the first step is the paper's
2 mean|x| / sqrt(Qp); the default, mse, is ours.
Ours: log s is the parameter, so that s > 0 and an optimizer step is relative to s; on an affine grid the zero point is
an integer fixed at calibration, so that the range scales about zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.grid import bounded_exp
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import LSQSpec, Role


@register(LSQSpec)
class LSQQuantizer(Quantizer):
    """Learned `log_scale` (C,), fixed zero point (C,)."""

    spec: LSQSpec
    fixed_zero_point: Tensor

    def __init__(self, spec: LSQSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_scale = nn.Parameter(torch.zeros(self.num_channels))
        one = torch.ones(self.num_channels)
        self.register_buffer("fixed_zero_point", self.grid.zero_point(-one, one))

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_scale]

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
