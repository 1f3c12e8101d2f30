"""Methods for weights whose clip is a statistic of the weight, recomputed at each forward and detached.

All use 2^b levels from -clip to clip, a mid-rise grid, with one clip per channel (or tensor).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsam2.quantizers.base import Quantizer, register
from qsam2.quantizers.observers import Distribution, extremes, magnitudes, update_running
from qsam2.recipe.quantizer_specs import DoReFaSpec, SAWBSpec, StatsQSpec

SAWB_COEFFICIENTS = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
    6: (22.41, -24.11),
    7: (27.09, -29.57),
    8: (31.76, -35.04),
}


@register(DoReFaSpec)
class DoReFaQuantizer(Quantizer):
    """DoReFa-Net's weights (Zhou et al., arXiv 1606.06160, eq. 9), by the largest |w| (C,).

    w^ = 2 q_b(tanh w / (2 max|tanh w|) + 1/2) - 1 with q_b(x) = [(2^b - 1) x] / (2^b - 1): a mid-rise grid on tanh w
    whose outermost levels are at max|tanh w|.
    Ours: w^ is multiplied by max|tanh w|, since SAM2 has no batch normalization behind its layers that would undo
    another scale. `freeze` replaces the weight by its tanh, so that the frozen quantizer is a plain grid and a
    finalized weight equals its own dequantized integers.
    """

    statistics = ("largest",)

    spec: DoReFaSpec
    largest: Tensor

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


@register(SAWBSpec)
class SAWBQuantizer(Quantizer):
    """SAWB: statistics-aware weight binning (Choi et al., arXiv 1807.06964), by mean magnitude and root mean square.

    clip = c1 sqrt(E[w^2]) + c2 E|w|, s = 2 clip / (2^b - 1). c1 and c2, fitted to the best clips of several
    distributions, are those of the code of IBM's fms-model-optimizer.
    Ours: coefficients for 6 and 7 bits, missing there, are interpolated; the clip is at least the root mean square:
    for weights of nearly equal magnitude the sum is negative from 4 bits on.
    """

    statistics = ("mean_abs", "rms")

    spec: SAWBSpec
    mean_abs: Tensor
    rms: Tensor

    def _initialize(self, observed: Distribution) -> None:
        self.mean_abs.copy_(observed.mean_abs)
        self.rms.copy_(torch.hypot(observed.mean, observed.std))

    def _update_statistics(self, x: Tensor) -> None:
        mean_abs, rms = magnitudes(x, self._observed_dim)
        update_running(self.mean_abs, mean_abs, momentum=0.0)
        update_running(self.rms, rms, momentum=0.0)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        of_rms, of_mean_abs = SAWB_COEFFICIENTS[self.bits]
        fitted = of_rms * self.rms.double() + of_mean_abs * self.mean_abs.double()  # neither product may overflow
        clip = torch.maximum(fitted.to(self.rms.dtype), self.rms)
        scale = self.grid.clamp_scale(clip / self.grid.largest_level)
        return scale, self.grid.zero_point(-clip, scale)


@register(StatsQSpec)
class StatsQQuantizer(Quantizer):
    """StatsQ: statistical weight quantization (Liu et al., OFQ, arXiv 2302.02210, eq. 7), by the mean magnitude (C,).

    a = 2 E|w|; w^ = a ([clip(w/a; -1, 1 - 1e-6) n - 1/2] + 1/2) / n with n = 2^(b-1): a mid-rise grid of s = a/n at any
    number of bits. The gradient of clipped weights is the identity, as in the authors' code; `clipped_gradient=zero` is
    the alternative.
    Ours: a is also per channel of convolutions, or per tensor.
    """

    statistics = ("mean_abs",)

    spec: StatsQSpec
    mean_abs: Tensor

    def _initialize(self, observed: Distribution) -> None:
        self.mean_abs.copy_(observed.mean_abs)

    def _update_statistics(self, x: Tensor) -> None:
        update_running(self.mean_abs, magnitudes(x, self._observed_dim)[0], momentum=0.0)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        clip = 2.0 * self.mean_abs
        return self.grid.from_bounds(-clip, clip)
