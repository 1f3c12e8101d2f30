"""StatsQ: statistical weight quantization (Liu et al., OFQ, arXiv 2302.02210, eq. 7).

a = 2 E|w| per channel, recomputed at each forward and detached; w^ = a ([clip(w/a; -1, 1 - 1e-6) n - 1/2] + 1/2) / n
with n = 2^(b-1): a mid-rise grid of s = a/n at any number of bits. The gradient of clipped weights is the identity, as
in the authors' code; `clipped_gradient=zero` is the alternative.
Ours: a is also per channel of convolutions, or per tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.observers import Distribution, magnitudes, update_running
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import Role, StatsQSpec


@register(StatsQSpec)
class StatsQQuantizer(Quantizer):
    """Mean magnitude (C,) of the last forward."""

    spec: StatsQSpec
    mean_abs: Tensor

    def __init__(self, spec: StatsQSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.register_buffer("mean_abs", torch.ones(self.num_channels))

    def _initialize(self, observed: Distribution) -> None:
        self.mean_abs.copy_(observed.mean_abs)

    def _update_statistics(self, x: Tensor) -> None:
        mean_abs, _ = magnitudes(x, self._observed_dim)
        update_running(self.mean_abs, mean_abs, momentum=0.0)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        clip = 2.0 * self.mean_abs
        return self.grid.from_bounds(-clip, clip)
