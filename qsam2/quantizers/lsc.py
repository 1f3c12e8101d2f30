"""LSC: learnable statistical clipping (the idea: Q-SAM2, arXiv 2506.09782; its update is not public, this one is ours).

Affine: bounds l = mu - alpha_0 * sigma, u = mu + alpha_1 * sigma, s = (u - l)/(2^b - 1), zero point [-l/s]; symmetric:
s = alpha * sigma / Qp (mid-rise: / 2^(b-1)). mu, sigma are detached and follow by momentum: for weights those of the
current weight, for activations those of each call, which count from the next optimizer step on; both in training mode
only. log alpha is learned, one a side, of a tensor or channel; its gradient comes through l, u and s as in LSQ and
PACT, times 1/sqrt(N Qp). The alphas start at the calibrated range: that of least error (`range=mse`), minmax or
percentile.
One factor a side is ours, too: what comes out of a GELU reaches far above its mean and hardly below it, and bounds at
equal distances leave 6 of the 16 codes of 4 bits unused there. Of 2 and 3 bits, zero of an activation may lie half-way
between two codes (`grid=least_error`). And sigma is followed as that of all batches together,
as calibration sees it: where one call differs from the next the mean of their own deviations is smaller (nano: 0.44 of
it for mask prompts, 0.75 to 0.95 in the mask decoder's heads), and training would clip what calibration had kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.distribution import Distribution
from qsam2.quantizers.grid import SMALLEST_SCALE, positive
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.quantizers.statistics import follow_moments, moments, sums
from qsam2.recipe.quantizers import LSCSpec, Role

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6
SMALLEST_STD = 1e-3  # of |mean|: a constant tensor has a range, too


@register(LSCSpec)
class LSCQuantizer(Quantizer):
    """Learned `log_alpha`: (2, C) for the two bounds, (1, C) on a symmetric grid; followed `mean` and `std` (C,)."""

    follows_sums = True

    spec: LSCSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: LSCSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_alpha = nn.Parameter(torch.zeros(1 if self.grid.symmetric else 2, self.num_channels))
        self.register_buffer("mean", torch.zeros(self.num_channels))
        self.register_buffer("std", torch.ones(self.num_channels))

    @property
    def alpha(self) -> Tensor:
        """Cut-off factors (1 or 2, C), in standard deviations, detached."""
        return self.log_alpha.detach().exp()

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_alpha]

    def _initialize(self, seen: Distribution) -> None:
        self.mean.copy_(seen.mean)
        self.std.copy_(seen.std)
        lower, upper = initial_bounds(seen, self.spec, self.grid)
        center, std = self._center_and_std()
        reach = torch.stack([center - lower, upper - center])
        if self.grid.symmetric:
            reach = reach.amax(0, keepdim=True)
        self.log_alpha.copy_((reach / std).clamp(SMALLEST_ALPHA, LARGEST_ALPHA).log())

    def _update_statistics(self, x: Tensor) -> None:
        if self.training and self.role == "weight":
            self._follow(*sums(x, self._observed_dim))

    def _follow(self, sums: Tensor, count: int) -> None:
        seen = moments(sums, count, over_ranks=self.role == "activation")
        follow_moments(self.mean, self.std, seen, self.spec.momentum)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        alpha = positive(self.log_alpha).clamp(max=LARGEST_ALPHA)
        center, std = self._center_and_std()
        return self.grid.from_bounds(center - alpha[0] * std, center + alpha[-1] * std)

    def _center_and_std(self) -> tuple[Tensor, Tensor]:
        # A new tensor: the graph keeps it, while a later call of the same step changes the buffer in place.
        std = torch.maximum(self.std, SMALLEST_STD * self.mean.abs()).clamp(min=SMALLEST_SCALE)
        return torch.zeros_like(self.mean) if self.grid.symmetric else self.mean, std
