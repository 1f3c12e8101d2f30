"""The ridge solution and ACNR's steps against dense solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qsam2.calibration.frobenius import Spectrum, acnr, ridge
from qsam2.calibration.gram import Moments

RHOS = (0.0, 1e-6, 1e-3, 0.1, 1.0, 100.0)


def inputs(count: int = 200, size: int = 12, seed: int = 0) -> Tensor:
    """Correlated, of very different energies, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(-2, 1, size)
    return torch.randn(count, size, generator=generator) @ mix + 3


def moments_of(x: Tensor) -> Moments:
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments


def weights(rows: int = 7, columns: int = 12) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(x: Tensor, weight: Tensor, rho: float, centred: bool) -> np.ndarray:
    """The least squares problem itself: rows of X, and sqrt(lambda) I below them."""
    data = x.double().numpy()
    data = data - data.mean(0) if centred else data
    strength = rho * len(data) * (data**2).mean()
    stacked = np.vstack([data, np.sqrt(strength) * np.eye(data.shape[1])])
    target = np.vstack([data @ weight.numpy().T, np.zeros((data.shape[1], len(weight)))])
    return np.linalg.lstsq(stacked, target, rcond=None)[0].T


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rho", RHOS[1:])
def test_ridge_is_the_dense_solution(rho: float, centred: bool) -> None:
    x, weight = inputs(), weights()
    (found,) = ridge(weight, Spectrum.of(moments_of(x), centred=centred), [rho])
    np.testing.assert_allclose(found.numpy(), dense(x, weight, rho, centred), rtol=1e-8, atol=1e-8)


def test_rho_zero_gives_the_weights_back_bit_for_bit_and_so_does_its_limit_at_full_rank() -> None:
    spectrum, weight = Spectrum.of(moments_of(inputs()), centred=True), weights()
    assert spectrum.rank == 12
    none, least = ridge(weight, spectrum, [0.0, 1e-13])
    assert torch.equal(none, weight)
    torch.testing.assert_close(least, weight, rtol=0, atol=1e-5)


@given(st.integers(0, 50))
def test_norm_falls_and_output_error_rises_with_rho(seed: int) -> None:
    x, weight = inputs(seed=seed), weights()
    moments = moments_of(x)
    found = ridge(weight, Spectrum.of(moments, centred=True), RHOS)
    norms = [float(each.norm()) for each in found]
    errors = [float(((weight - each) @ moments.covariance @ (weight - each).T).trace()) for each in found]
    assert norms == sorted(norms, reverse=True) and errors == sorted(errors)


def test_what_the_inputs_never_show_is_dropped() -> None:
    x = inputs()
    x[:, 4] = x[:, 7]  # W acts on their sum only
    x[:, 2] = 5.0  # the bias takes it up
    spectrum, weight = Spectrum.of(moments_of(x), centred=True), weights()
    assert spectrum.rank == 10 and 1 < spectrum.condition_number < 1e10
    none, found = ridge(weight, spectrum, [0.0, 1e-9])
    assert torch.equal(none, weight)
    half = (weight[:, 4] + weight[:, 7]) / 2
    for column, expected in ((4, half), (7, half), (2, 0 * half)):
        torch.testing.assert_close(found[:, column], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6, -3.7e-5])
def test_constant_inputs_have_rank_zero_and_keep_the_weights(value: float) -> None:
    spectrum = Spectrum.of(moments_of(torch.full((1000, 12), value)), centred=True)
    assert (spectrum.rank, spectrum.condition_number) == (0, 1.0)
    assert all(torch.equal(found, weights()) for found in ridge(weights(), spectrum, RHOS))


def test_fewer_rows_than_inputs() -> None:
    spectrum = Spectrum.of(moments_of(inputs(count=5)), centred=True)
    assert spectrum.rank == 4
    assert all(found.isfinite().all() for found in ridge(weights(), spectrum, RHOS))


def reference_acnr(weight: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """One SVD a step, one singular value at a time."""
    for _ in range(steps):
        left, sigma, right = np.linalg.svd(weight, full_matrices=False)
        mean, share, raised = sigma.mean(), 0.0, []
        for index, value in enumerate(sigma):
            pulled = (value + 2 * 0.003 * mean) / (1 + 2 * 0.003 + 2 * 0.001 * (right[index] ** 2 @ noise))
            raised.append(value if share <= 0.8 * (sigma**2).sum() else max(value, pulled))
            share += value**2
        weight = left @ np.diag(raised) @ right
    return weight


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("noisy", [0.0, 30.0])
def test_acnr_takes_the_steps_of_the_reference(shape: tuple[int, int], noisy: float) -> None:
    weight = weights(*shape) @ torch.logspace(0, -3, shape[1], dtype=torch.float64).diag()
    noise = noisy * torch.linspace(0, 1, shape[1], dtype=torch.float64)
    none, one, many = acnr(weight, noise, (0, 1, 25))
    assert torch.equal(none, weight)
    for found, steps in ((one, 1), (many, 25)):
        np.testing.assert_allclose(found.numpy(), reference_acnr(weight.numpy(), noise.numpy(), steps), atol=1e-10)
    before, after = (torch.linalg.svdvals(each) for each in (weight, many))
    torch.testing.assert_close(after[0], before[0])
    assert after[-1] > 2 * before[-1] and after[0] / after[-1] < before[0] / before[-1]


def test_acnr_of_a_zero_weight_stays_zero() -> None:
    assert not acnr(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), (5,))[0].any()
