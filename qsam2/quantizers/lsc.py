"""LSC: learnable statistical clipping (the idea: Q-SAM2, arXiv 2506.09782; its update is not public, this one is ours).

Bounds l = mu - alpha * sigma, u = mu + alpha * sigma; affine: s = (u - l)/(2^b - 1), zero point [-l/s]; symmetric:
s = alpha * sigma / Qp (mid-rise: / 2^(b-1)). mu, sigma are detached and follow by momentum: for activations those of
the batches, for weights those of the current weight, both in training mode only. log alpha is learned, one a tensor or
channel; its gradient comes through l, u and s as in LSQ and PACT, times 1/sqrt(N Qp). Alpha starts where the
quantization error on the calibration data is least (`range=mse`), or reaches the minmax or percentile bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.distribution import Distribution
from qsam2.quantizers.grid import SMALLEST_SCALE, positive
from qsam2.quantizers.mse import best_clip_ratio
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.quantizers.statistics import follow, moments
from qsam2.recipe.quantizers import LSCSpec, Role

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6
SMALLEST_STD = 1e-3  # of |mean|: a constant tensor has a range, too


@register(LSCSpec)
class LSCQuantizer(Quantizer):
    """Learned `log_alpha` (C,), followed `mean` and `std` (C,)."""

    spec: LSCSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: LSCSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_alpha = nn.Parameter(torch.zeros(self.num_channels))
        self.register_buffer("mean", torch.zeros(self.num_channels))
        self.register_buffer("std", torch.ones(self.num_channels))

    @property
    def alpha(self) -> Tensor:
        """Cut-off factor (C,), in standard deviations, detached."""
        return self.log_alpha.detach().exp()

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_alpha]

    def _initialize(self, seen: Distribution) -> None:
        self.mean.copy_(seen.mean)
        self.std.copy_(seen.std)
        if self.spec.range == "mse":
            widest = self._alpha_of(seen.minimum, seen.maximum)
            alpha = widest * best_clip_ratio(seen, self.grid, lambda ratio: self._bounds(widest * ratio))
        else:
            alpha = self._alpha_of(*initial_bounds(seen, self.spec, self.grid))
        self.log_alpha.copy_(alpha.log())

    def _update_statistics(self, x: Tensor) -> None:
        if not self.training:
            return
        mean, std = moments(x, self._observed_dim, over_ranks=self.role == "activation")
        follow(self.mean, mean, self.spec.momentum)
        follow(self.std, std, self.spec.momentum)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        return self.grid.from_bounds(*self._bounds(positive(self.log_alpha).clamp(max=LARGEST_ALPHA)))

    def _center_and_std(self) -> tuple[Tensor, Tensor]:
        # A new tensor: the graph keeps it, while a later call of the same step changes the buffer in place.
        std = torch.maximum(self.std, SMALLEST_STD * self.mean.abs()).clamp(min=SMALLEST_SCALE)
        return torch.zeros_like(self.mean) if self.grid.symmetric else self.mean, std

    def _bounds(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        center, std = self._center_and_std()
        return center - alpha * std, center + alpha * std

    def _alpha_of(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The least alpha (C,) whose bounds hold [lower, upper]."""
        center, std = self._center_and_std()
        return (torch.maximum(upper - center, center - lower) / std).clamp(min=SMALLEST_ALPHA)
