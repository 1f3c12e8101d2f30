"""SAWB: statistics-aware weight binning (Choi et al., arXiv 1807.06964).

clip = c1 sqrt(E[w^2]) + c2 E|w|, recomputed at each forward and detached; 2^b levels from -clip to clip, a mid-rise
grid: s = 2 clip / (2^b - 1). c1 and c2, fitted to the best clips of several distributions, are those of the code of
IBM's fms-model-optimizer.
Ours: coefficients for 6 and 7 bits, missing there, are interpolated; one clip per channel (or tensor), at least the
root mean square: for weights of nearly equal magnitude the sum is negative from 4 bits on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.observers import Distribution, magnitudes, update_running
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import Role, SAWBSpec

COEFFICIENTS = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
    6: (22.41, -24.11),
    7: (27.09, -29.57),
    8: (31.76, -35.04),
}


@register(SAWBSpec)
class SAWBQuantizer(Quantizer):
    """Mean magnitude and root mean square (C,) of the last forward."""

    spec: SAWBSpec
    mean_abs: Tensor
    rms: Tensor

    def __init__(self, spec: SAWBSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.register_buffer("mean_abs", torch.ones(self.num_channels))
        self.register_buffer("rms", torch.ones(self.num_channels))

    def _initialize(self, observed: Distribution) -> None:
        self.mean_abs.copy_(observed.mean_abs)
        self.rms.copy_(torch.hypot(observed.mean, observed.std))

    def _update_statistics(self, x: Tensor) -> None:
        mean_abs, rms = magnitudes(x, self._observed_dim)
        update_running(self.mean_abs, mean_abs, momentum=0.0)
        update_running(self.rms, rms, momentum=0.0)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        of_rms, of_mean_abs = COEFFICIENTS[self.bits]
        clip = torch.maximum(of_rms * self.rms + of_mean_abs * self.mean_abs, self.rms)
        scale = self.grid.clamp_scale(clip / self.grid.largest_level)
        return scale, self.grid.zero_point(-clip, scale)
