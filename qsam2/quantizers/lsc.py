"""LSC: learnable statistical clipping (the idea: Q-SAM2, arXiv 2506.09782; its update is not public, this one is ours).

s = alpha * sigma / Qp on a symmetric grid (mid-rise: / 2^(b-1)), 2 alpha * sigma / (2^b - 1) on an affine one
(mid-rise: / 2^b), whose zero point is fixed at calibration, as in LSQ. sigma is detached and, in training mode, a
running average: of the current weight, or (optional) of an activation's calls, with effect from the next optimizer step
on. log alpha is learned, per tensor or channel, by LSQ's gradient of s, times 1/sqrt(N Qp). alpha starts at the
calibrated range: that of least error (`range=mse`), minmax or percentile.

Bounds are not mu -+ alpha * sigma in training, because the output of a GELU reaches far above its mean, hardly below
it, and has a fixed lower end: with bounds that moved with mu and sigma, the zero point of such layers went from 1 to 0,
a loss of 10 dB. sigma of activations is constant by default (`momentum` 1): with collapsed 2-bit weights, activations
leave the range of calibration (nano_heavy: 0.4 of the values of one layer) and have to be clipped, while a sigma
averaged at 0.99 widened that step 30 times (docs/tables/lsc.md has the scores). With 2 and 3 bits, zero of an
activation may lie half-way between two codes (`grid=least_error`). A running sigma is that of all batches together, as
in calibration: the mean of the deviations of single calls is smaller (nano: 0.44 of it for mask prompts, 0.75 to 0.95
in the mask decoder's heads), and would clip values inside the calibrated range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.grid import SMALLEST_SCALE, bounded_exp
from qsam2.quantizers.observers import Distribution, moments, sums, update_moments
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import LSCSpec, Role

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6
SMALLEST_STD = 1e-3  # of |mean|, so that a constant tensor has a range


@register(LSCSpec)
class LSCQuantizer(Quantizer):
    """Learned `log_alpha` (C,), fixed zero point (C,); running `mean` and `std` (C,)."""

    spec: LSCSpec
    mean: Tensor
    std: Tensor
    fixed_zero_point: Tensor

    def __init__(self, spec: LSCSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_alpha = nn.Parameter(torch.zeros(self.num_channels))
        one = torch.ones(self.num_channels)
        self.register_buffer("mean", torch.zeros_like(one))
        self.register_buffer("std", one.clone())
        self.register_buffer("fixed_zero_point", self.grid.zero_point(-one, one))

    @property
    def alpha(self) -> Tensor:
        """Clipping factor (C,), in standard deviations, detached."""
        return self.log_alpha.detach().exp()

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_alpha]

    def _initialize(self, observed: Distribution) -> None:
        self.mean.copy_(observed.mean)
        self.std.copy_(observed.std)
        scale, zero_point = self.grid.from_bounds(*initial_bounds(observed, self.spec, self.grid))
        alpha = scale * self._steps_of_alpha / self._std()
        self.log_alpha.copy_(alpha.clamp(SMALLEST_ALPHA, LARGEST_ALPHA).log())
        self.fixed_zero_point.copy_(zero_point)

    @property
    def momentum(self) -> float:
        """Share of the running statistics that a step (weights) or call (activations) keeps; 1: they are constant."""
        assert self.spec.momentum is not None  # `for_role` has resolved it
        return self.spec.momentum

    @property
    def needs_sums(self) -> bool:
        return self.momentum < 1

    def _update_statistics(self, x: Tensor) -> None:
        if self.training and self.role == "weight" and self.momentum < 1:
            self._update_from_sums(*sums(x, self._observed_dim))

    def _update_from_sums(self, sums: Tensor, count: int) -> None:
        batch = moments(sums, count, over_ranks=self.role == "activation")
        update_moments(self.mean, self.std, batch, self.momentum)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        alpha = bounded_exp(self.log_alpha).clamp(max=LARGEST_ALPHA)
        return self.grid.clamp_scale(alpha * self._std() / self._steps_of_alpha), self.fixed_zero_point

    @property
    def _steps_of_alpha(self) -> float:
        """Number of steps in alpha * sigma: one side of a symmetric grid, half of an affine one."""
        last = self.grid.qmax + self.grid.mid_rise
        return float(last) if self.grid.symmetric else last / 2

    def _std(self) -> Tensor:
        # a new tensor: the graph keeps it, while a later call of the same step changes the buffer in place
        return torch.maximum(self.std, SMALLEST_STD * self.mean.abs()).clamp(min=SMALLEST_SCALE)
