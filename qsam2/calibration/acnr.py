"""Activation-aware condition number reduction of AHCQ-SAM: the small singular values of a weight are raised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
