"""DoReFa-Net's weights (Zhou et al., arXiv 1606.06160, eq. 9).

w^ = 2 q_b(tanh w / (2 max|tanh w|) + 1/2) - 1 with q_b(x) = [(2^b - 1) x] / (2^b - 1): a mid-rise grid on tanh w whose
outermost levels are at max|tanh w|.
Ours: w^ is multiplied by max|tanh w|, per channel (or tensor), recomputed at each forward and detached: SAM2 has no
batch normalization behind its layers that would undo another scale. `freeze` replaces the weight by its tanh, so that
the frozen quantizer is a plain grid and a finalized weight equals its own dequantized integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.observers import Distribution, extremes, update_running
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import DoReFaSpec, Role


@register(DoReFaSpec)
class DoReFaQuantizer(Quantizer):
    """Largest |w| (C,) of the last forward."""

    spec: DoReFaSpec
    largest: Tensor

    def __init__(self, spec: DoReFaSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.register_buffer("largest", torch.ones(self.num_channels))

    def _initialize(self, observed: Distribution) -> None:
        self.largest.copy_(torch.maximum(-observed.minimum, observed.maximum))

    def _update_statistics(self, x: Tensor) -> None:
        minimum, maximum = extremes(x, self._observed_dim, over_ranks=False)
        update_running(self.largest, torch.maximum(-minimum, maximum), momentum=0.0)

    def _transform(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).tanh()

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        scale = self.grid.clamp_scale(self.largest.tanh() / self.grid.largest_level)
        return scale, self.grid.zero_point(-scale, scale)
