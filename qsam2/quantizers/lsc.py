"""LSC: learnable statistical clipping (the idea: Q-SAM2, arXiv 2506.09782; its update is not public, this one is ours).

s = alpha * sigma / Qp on a symmetric grid (mid-rise: / 2^(b-1)), 2 alpha * sigma / (2^b - 1) on an affine one
(mid-rise: / 2^b), whose zero point is the one that calibration found, as LSQ's is. sigma is detached and follows by
momentum, in training mode only: for weights that of the current weight, for activations, if asked to, that of each
call, which counts from the next optimizer step on. log alpha is learned, one a tensor or channel, by LSQ's gradient of
s, times 1/sqrt(N Qp).
alpha starts at the calibrated range: that of least error (`range=mse`), minmax or percentile.

Why bounds are not mu -+ alpha * sigma in training: what comes out of a GELU reaches far above its mean and hardly below
it, and ends where it does whatever its mean. With bounds that moved with mu and sigma the zero point of such layers
went from 1 to 0, which costs them 10 dB. Why sigma of activations stays as well unless told otherwise (`momentum` 1):
weights in ruins send values far beyond the float model's (nano_heavy at 2 bits: 0.4 of one layer's), and the clip is
what cuts them off; a sigma that followed them at 0.99 widened that step by 30 (docs/tables/lsc.md has what it cost).
Of 2 and 3 bits, zero of an activation may lie half-way between two codes (`grid=least_error`). A sigma that follows is
that of all batches together, as calibration sees it: where one call differs from the next the mean of their own
deviations is smaller (nano: 0.44 of it for mask prompts, 0.75 to 0.95 in the mask decoder's heads), and training would
clip what calibration had kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.grid import SMALLEST_SCALE, positive
from qsam2.quantizers.observers import Distribution, follow_moments, moments, sums
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import LSCSpec, Role

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6
SMALLEST_STD = 1e-3  # of |mean|: a constant tensor has a range, too


@register(LSCSpec)
class LSCQuantizer(Quantizer):
    """Learned `log_alpha` (C,), fixed zero point (C,); followed `mean` and `std` (C,)."""

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
        """Cut-off factor (C,), in standard deviations, detached."""
        return self.log_alpha.detach().exp()

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_alpha]

    def _initialize(self, seen: Distribution) -> None:
        self.mean.copy_(seen.mean)
        self.std.copy_(seen.std)
        scale, zero_point = self.grid.from_bounds(*initial_bounds(seen, self.spec, self.grid))
        alpha = scale * self._steps_of_alpha / self._std()
        self.log_alpha.copy_(alpha.clamp(SMALLEST_ALPHA, LARGEST_ALPHA).log())
        self.fixed_zero_point.copy_(zero_point)

    @property
    def momentum(self) -> float:
        """Share of what was followed that a step (weights) or call (activations) keeps, 0 to 1; 1: it stays. Ours."""
        assert self.spec.momentum is not None  # `for_role` has resolved it
        return self.spec.momentum

    @property
    def follows_sums(self) -> bool:
        return self.momentum < 1

    def _update_statistics(self, x: Tensor) -> None:
        if self.training and self.role == "weight" and self.momentum < 1:
            self._follow(*sums(x, self._observed_dim))

    def _follow(self, sums: Tensor, count: int) -> None:
        seen = moments(sums, count, over_ranks=self.role == "activation")
        follow_moments(self.mean, self.std, seen, self.momentum)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        alpha = positive(self.log_alpha).clamp(max=LARGEST_ALPHA)
        return self.grid.clamp_scale(alpha * self._std() / self._steps_of_alpha), self.fixed_zero_point

    @property
    def _steps_of_alpha(self) -> float:
        """How many steps alpha * sigma is: a symmetric grid's reach to one side, half that of an affine one."""
        last = self.grid.qmax + self.grid.mid_rise
        return float(last) if self.grid.symmetric else last / 2

    def _std(self) -> Tensor:
        # A new tensor: the graph keeps it, while a later call of the same step changes the buffer in place.
        return torch.maximum(self.std, SMALLEST_STD * self.mean.abs()).clamp(min=SMALLEST_SCALE)
