"""PACT: parameterized clipping activation (Choi et al., arXiv 1805.06085).

y = clip(x; 0, alpha), then uniform quantization with s = alpha/(2^b - 1); d y/d alpha = 1 where x >= alpha, else 0
(eq. 1-3): alpha gets no gradient from rounding; an L2 penalty `decay` * alpha^2 in the loss lowers it.
Ours: two-sided for SAM2's signed activations, y = clip(x; -alpha_0, alpha_1), both learned, or one alpha for both ends
on a symmetric grid. Without negative values in calibration alpha_0 stays zero, which is the paper's case.
The logarithms are learned; the alphas start at the calibrated range; zero points are rounded (straight through),
which moves up to 1/2 / (2^b - 1) of the gradient of one end to the other; all gradients, the penalty's included, are
times LSQ's 1/sqrt(N Qp); the penalty counts once per call, as the loss sums over frames and clicks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam2.quantizers.base import Quantizer
from qsam2.quantizers.fake_quant import gradient_scale
from qsam2.quantizers.grid import SMALLEST_SCALE, bounded_exp
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import initial_bounds
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import PACTSpec, Role

LARGEST_PULL = 1e6  # keeps the penalty's gradient finite for any clip


@register(PACTSpec)
class PACTQuantizer(Quantizer):
    """Learned `log_clips`: (2, C) for the lower and upper end, (1, C) on a symmetric grid."""

    residual_gradient = False

    spec: PACTSpec

    def __init__(self, spec: PACTSpec, role: Role, **kwargs: Any) -> None:
        super().__init__(spec, role, **kwargs)
        self.log_clips = nn.Parameter(torch.zeros(1 if self.grid.symmetric else 2, self.num_channels))
        self._elements = 1  # N: elements of a sample that share a clip

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self.log_clips]

    def _initialize(self, observed: Distribution) -> None:
        lower, upper = initial_bounds(observed, self.spec, self.grid)
        clips = torch.maximum(-lower, upper)[None] if self.grid.symmetric else torch.stack([-lower, upper])
        self.log_clips.copy_(clips.clamp(min=SMALLEST_SCALE).log())

    def _update_statistics(self, x: Tensor) -> None:
        self._elements = max(x.numel() // (max(len(x), 1) * self.num_channels), 1)

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        clips = bounded_exp(self.log_clips)
        if self.training and self.spec.decay:
            clips = _Penalized.apply(clips, self.spec.decay * gradient_scale(self._elements, self.grid.largest_level))
        return self.grid.from_bounds(-clips[0], clips[-1])


class _Penalized(torch.autograd.Function):
    """Identity of the clips; the gradient is that of loss + strength * clips^2."""

    @staticmethod
    def forward(ctx: Any, clips: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(clips)
        ctx.strength = strength
        return clips.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (clips,) = ctx.saved_tensors
        return grad + 2.0 * ctx.strength * clips.clamp(max=LARGEST_PULL), None
