"""Learned clips: PACT, whose clips are values, and LSC, whose clip is a number of standard deviations.

PACT: parameterized clipping activation (Choi et al., arXiv 1805.06085).
y = clip(x; 0, alpha), then uniform quantization with s = alpha/(2^b - 1); d y/d alpha = 1 where x >= alpha, else 0
(eq. 1-3): alpha gets no gradient from rounding; an L2 penalty `decay` * alpha^2 in the loss lowers it.
Ours: two-sided for SAM2's signed activations, y = clip(x; -alpha_0, alpha_1), both learned, or one alpha for both ends
on a symmetric grid. Without negative values in calibration alpha_0 stays zero, which is the paper's case.
The logarithms are learned; the alphas start at the calibrated range; zero points are rounded (straight through),
which moves up to 1/2 / (2^b - 1) of the gradient of one end to the other; all gradients, the penalty's included, are
times LSQ's 1/sqrt(N Qp); the penalty counts once per call, as the loss sums over frames and clicks.

LSC: learnable statistical clipping (the idea: Q-SAM2, arXiv 2506.09782; its update is not public, this one is ours).
s = alpha * sigma / Qp on a symmetric grid (mid-rise: / 2^(b-1)), 2 alpha * sigma / (2^b - 1) on an affine one
(mid-rise: / 2^b), whose zero point is fixed at calibration, as in LSQ. sigma is detached and, in training mode, a
running average: of the current weight, or (optional) of an activation's calls, with effect from the next optimizer step
on. log alpha is learned, per tensor or channel, by LSQ's gradient of s, times 1/sqrt(N Qp). alpha starts at the
calibrated range: that of least error (`range=mse`), minmax or percentile.

LSC's bounds are not mu -+ alpha * sigma in training, because the output of a GELU reaches far above its mean, hardly
below it, and has a fixed lower end: with bounds that moved with mu and sigma, the zero point of such layers went from 1
to 0, a loss of 10 dB. sigma of activations is constant by default (`momentum` 1): with collapsed 2-bit weights,
activations leave the range of calibration (nano_heavy: 0.4 of the values of one layer) and have to be clipped, while a
sigma averaged at 0.99 widened that step 30 times (docs/tables/lsc.md has the scores). With 2 and 3 bits, zero of an
activation may lie half-way between two codes (`grid=least_error`). A running sigma is that of all batches together, as
in calibration: the mean of the deviations of single calls is smaller (nano: 0.44 of it for mask prompts, 0.75 to 0.95
in the mask decoder's heads), and would clip values inside the calibrated range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer, register
from qsam2.quantizers.fake_quant import OnSums, gradient_scale
from qsam2.quantizers.grid import SMALLEST_SCALE, bounded_exp
from qsam2.quantizers.observers import Distribution, moments, sums, update_moments
from qsam2.quantizers.ranges import initial_bounds
from qsam2.recipe.quantizer_specs import LSCSpec, PACTSpec, Role

LARGEST_PULL = 1e6  # keeps the gradient of PACT's penalty finite for any clip
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6
SMALLEST_STD = 1e-3  # of |mean|, so that a constant tensor has a range


@register(PACTSpec)
class PACTQuantizer(Quantizer):
    """Learned `log_clips`: (2, C) for the lower and upper end, (1, C) on a symmetric grid."""

    residual_gradient = False

    spec: PACTSpec

    def __init__(self, spec: PACTSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_clips = nn.Parameter(torch.zeros(1 if self.grid.symmetric else 2, self.num_channels))
        self._elements = 1  # N: elements of a sample that share a clip

    def _initialize(self, observed: Distribution) -> None:
        lower, upper = initial_bounds(observed, self.spec, self.grid)
        clips = torch.maximum(-lower, upper)[None] if self.grid.symmetric else torch.stack([-lower, upper])
        self.log_clips.copy_(clips.clamp(min=SMALLEST_SCALE).log())

    def _update_statistics(self, x: Tensor) -> None:
        self._elements = max(x.numel() // (max(len(x), 1) * self.num_channels), 1)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        clips = bounded_exp(self.log_clips)
        if self.training and self.spec.decay and clips.requires_grad:
            strength = self.spec.decay * gradient_scale(self._elements, self.grid.largest_level)
            penalty = 2.0 * strength * clips.detach().clamp(max=LARGEST_PULL)
            clips.register_hook(lambda grad: grad + penalty)
        return self.grid.from_bounds(-clips[0], clips[-1])


@register(LSCSpec)
class LSCQuantizer(Quantizer):
    """Learned `log_alpha` (C,), fixed zero point (C,); running `mean` and `std` (C,)."""

    statistics = ("mean", "std", "fixed_zero_point")

    spec: LSCSpec
    mean: Tensor
    std: Tensor
    fixed_zero_point: Tensor

    def __init__(self, spec: LSCSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_alpha = nn.Parameter(torch.zeros(self.num_channels))
        assert self.spec.momentum is not None  # `for_role` has resolved it
        self.momentum = self.spec.momentum
        """Share of the running statistics that a step (weights) or call (activations) keeps; 1: they are constant."""

    def _initialize(self, observed: Distribution) -> None:
        self.mean.copy_(observed.mean)
        self.std.copy_(observed.std)
        scale, zero_point = self.grid.from_bounds(*initial_bounds(observed, self.spec, self.grid))
        alpha = scale * self._steps_of_alpha / self._std()
        self.log_alpha.copy_(alpha.clamp(SMALLEST_ALPHA, LARGEST_ALPHA).log())
        self.fixed_zero_point.copy_(zero_point)

    def _update_statistics(self, x: Tensor) -> None:
        if self.training and self.role == "weight" and self.momentum < 1:
            self._update_from_sums(*sums(x, self._observed_dim))

    @property
    def _on_sums(self) -> OnSums | None:
        return self._update_from_sums if self.momentum < 1 else None

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
