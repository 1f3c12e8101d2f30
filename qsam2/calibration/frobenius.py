"""New weights for a linear layer that are easier to quantize and give nearly the same outputs.

`ridge` (Q-SAM2, arXiv 2506.09782) lessens the Frobenius norm where the inputs hardly vary; `acnr` (AHCQ-SAM) raises
small singular values. `calibration.weights` chooses the strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsam2.calibration.gram import Moments

ROUNDING = 1e-13
"""Eigenvalues below this share of the largest are zero up to the rounding of float32 inputs."""
PULL = 0.003
"""The paper's lambda: strength of the pull of singular values to their mean."""
DAMPING = 0.001
"""The paper's beta: strength of the damping by the activations' quantization error."""
LEADING = 0.8
"""Share of the energy whose singular values stay unchanged."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (n,) ascending and eigenvectors (n, n) of a layer's Gram matrix over its count, float64."""

    values: Tensor
    vectors: Tensor
    rank: int

    @classmethod
    def of(cls, moments: Moments, *, centred: bool) -> Spectrum:
        """Spectrum of the inputs about their mean, or about zero if there is no bias to absorb the mean."""
        second = torch.outer(moments.mean, moments.mean)
        gram = moments.covariance if centred else moments.covariance + second
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        # the scatter of a constant input is the rounding of its mean
        least = ROUNDING * torch.maximum(values[-1], ROUNDING * second.diagonal().sum())
        return cls(values, vectors, int((values > least).sum()))

    @property
    def condition_number(self) -> float:
        """Ratio of the largest eigenvalue to the smallest above zero; 1 if there is none."""
        return float(self.values[-1] / self.values[-self.rank]) if self.rank else 1.0


def ridge(weight: Tensor, spectrum: Spectrum, rhos: Sequence[float]) -> list[Tensor]:
    """Minimisers of E |(W - W^) x|^2 + lambda |W^|^2 for each rho, lambda = rho * mean of the Gram's diagonal.

    Q-SAM2's closed form W C (C + lambda I)^-1, C the (centred: ours) Gram matrix over the count, scales W along
    eigenvector k by s_k / (s_k + lambda). rho = 0 and constant inputs give W itself, also if C is singular (ours; the
    limit would remove the directions in which the inputs do not vary).

    Args:
        weight: (m, n) float64.
    """
    if not spectrum.rank:
        return [weight for _ in rhos]
    rotated = weight @ spectrum.vectors
    mean = spectrum.values.mean()
    shrunk = (spectrum.values / (spectrum.values + rho * mean) if rho else None for rho in rhos)
    return [weight if factor is None else (rotated * factor) @ spectrum.vectors.T for factor in shrunk]


def acnr(weight: Tensor, noise: Tensor, steps: Sequence[float]) -> list[Tensor]:
    """W after each number of proximal steps; W itself for 0.

    sigma <- max(sigma, (sigma + 2 lambda t) / (1 + 2 lambda + 2 beta c)) for all but the leading singular values, t the
    mean of all, c the activations' quantization error along the direction, here (ours) of uncorrelated inputs. From the
    authors' code; without its threshold on the condition number, since 0 steps are a candidate.

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
        leading[int(leading.sum().clamp(max=len(leading) - 1))] = True  # and the one that crosses the share
        raised = (sigma + 2 * PULL * sigma.mean()) / (1 + 2 * PULL + 2 * DAMPING * along)
        sigma = torch.where(leading[order.argsort()], sigma, torch.maximum(sigma, raised))
        if step in steps:
            results[step] = (left * sigma) @ right
    return [results[int(step)] for step in steps]
