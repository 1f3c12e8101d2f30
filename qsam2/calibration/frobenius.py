"""Calibrated weights of a linear layer: least Frobenius norm (Q-SAM2), and small singular values raised (AHCQ-SAM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsam2.calibration.gram import Moments

ROUNDING = 1e-13
"""Eigenvalues below this share of the largest are what float32 inputs leave of zero."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (n,) ascending and eigenvectors (n, n) of a layer's Gram matrix over its count, float64."""

    values: Tensor
    vectors: Tensor
    rank: int

    @classmethod
    def of(cls, moments: Moments, *, centred: bool) -> Spectrum:
        """That of the inputs about their mean, or about zero where no bias can take up the mean."""
        second = torch.outer(moments.mean, moments.mean)
        gram = moments.covariance if centred else moments.covariance + second
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        # a constant input's scatter is rounding of its mean
        least = ROUNDING * torch.maximum(values[-1], ROUNDING * second.diagonal().sum())
        return cls(values, vectors, int((values > least).sum()))

    @property
    def condition_number(self) -> float:
        """Of the directions in which the inputs vary at all; 1 where there is none."""
        return float(self.values[-1] / self.values[-self.rank]) if self.rank else 1.0


def ridge(weight: Tensor, spectrum: Spectrum, rhos: Sequence[float]) -> list[Tensor]:
    """What minimises E |(W - W^) x|^2 + lambda |W^|^2 for each rho, lambda = rho * mean of the Gram's diagonal.

    Q-SAM2's closed form W C (C + lambda I)^-1, C the (centred: ours) Gram matrix over the count: it shrinks W along
    eigenvector k by s_k / (s_k + lambda). rho = 0 gives W itself, also where C is singular (ours; the limit would drop
    what the inputs never show), and so do inputs that are constant.

    Args:
        weight: (m, n) float64.
    """
    if not spectrum.rank:
        return [weight for _ in rhos]
    rotated = weight @ spectrum.vectors
    mean = spectrum.values.mean()
    shrunk = (spectrum.values / (spectrum.values + rho * mean) if rho else None for rho in rhos)
    return [weight if factor is None else (rotated * factor) @ spectrum.vectors.T for factor in shrunk]


PULL = 0.003
"""The paper's lambda: how strongly singular values are drawn to their mean."""
DAMPING = 0.001
"""The paper's beta: how strongly the activations' quantization error holds them back."""
LEADING = 0.8
"""Share of the energy whose singular values are left alone."""


def acnr(weight: Tensor, noise: Tensor, steps: Sequence[float]) -> list[Tensor]:
    """W after each of the numbers of proximal steps; after 0 it is W itself.

    sigma <- max(sigma, (sigma + 2 lambda t) / (1 + 2 lambda + 2 beta c)) beyond the leading singular values, t their
    mean, c the activations' quantization error along the direction, here (ours) that of uncorrelated inputs. From the
    authors' code; without its threshold on the condition number, since 0 steps are a choice.

    Args:
        weight: (m, n) float64.
        noise: (n,) mean squared quantization error of each input.
    """
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    along = right.square() @ noise  # (min(m, n),)
    results = {0: weight}
    for step in range(1, int(max(steps)) + 1):
        energy, order = sigma.square().sort(descending=True)
        leading = energy.cumsum(0) <= LEADING * energy.sum()
        leading[int(leading.sum().clamp(max=len(leading) - 1))] = True  # the one that crosses the share, too
        raised = (sigma + 2 * PULL * sigma.mean()) / (1 + 2 * PULL + 2 * DAMPING * along)
        sigma = torch.where(leading[order.argsort()], sigma, torch.maximum(sigma, raised))
        if step in steps:
            results[step] = (left * sigma) @ right
    return [results[int(step)] for step in steps]
