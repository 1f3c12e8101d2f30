"""Statistics of observers, and the ranges chosen from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsam2.quantizers import observers, ranges
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.observers import Distribution, Observer
from qsam2.quantizers.ranges import best_bounds, best_clip_ratio, percentile_bounds

CPU = torch.device("cpu")


def observe(*batches: Tensor, channel_dim: int | None = None) -> Distribution:
    observer = Observer(1 if channel_dim is None else batches[0].shape[channel_dim], channel_dim)
    assert all([observer.update(batch) for batch in batches])
    seen = observer.distribution(CPU)
    assert seen is not None
    return seen


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([1e-8, 1.0, 1e6]), st.sampled_from([None, 0, 1, -1]))
def test_an_observer_has_seen_all_data(seed: int, size: float, channel_dim: int | None) -> None:
    """Exact statistics, each value within a bin, and no trace of the order of batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = [size * factor * (torch.randn(4, 5, generator=generator) * 10.0**factor + factor) for factor in range(4)]
    seen, again = (observe(*each, channel_dim=channel_dim) for each in (batches, batches[::-1]))
    assert torch.equal(seen.counts, again.counts) and torch.equal(seen.values, again.values)
    joint = torch.cat(batches, 1 if channel_dim == 0 else 0)
    rows = (joint[None] if channel_dim is None else joint.movedim(channel_dim, 0)).flatten(1)
    exact = rows.double().numpy()
    for actual, expected in (
        (seen.minimum, exact.min(1)),
        (seen.maximum, exact.max(1)),
        (seen.mean, exact.mean(1)),
        (seen.std, exact.std(1)),
        (seen.mean_abs, np.abs(exact).mean(1)),
    ):
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-5 * size)
    for row, values, counts in zip(rows, seen.values, seen.counts, strict=True):
        restored = torch.repeat_interleave(values, counts.long())
        assert (restored - row.sort().values).abs().max() <= 2 * row.abs().max() / observers.BINS_PER_SIDE


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_agree_with_numpy(percentile: float, symmetric: bool) -> None:
    x = torch.randn(50_000) ** 3 + 0.5
    array = np.abs(x.numpy()) if symmetric else x.numpy()
    expected = np.percentile(array, [100 - percentile, percentile])
    expected = [-expected[1], expected[1]] if symmetric else expected
    resolution = 2 * float(x.abs().max()) / observers.BINS_PER_SIDE
    for seen in (observe(x[:20_000], x[20_000:]), Distribution.of(x, None)):
        bounds = [bound.item() for bound in percentile_bounds(seen, percentile, symmetric)]
        assert bounds == pytest.approx(list(expected), rel=2e-2, abs=resolution)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "student", "outlier", "uniform"])
def test_coarse_to_fine_finds_what_all_hundred_ratios_give(
    monkeypatch: pytest.MonkeyPatch, bits: int, kind: str
) -> None:
    torch.manual_seed(bits)
    x = {
        "normal": torch.randn(450, 300),
        "student": torch.distributions.StudentT(3.0).sample((450, 300)),
        "outlier": torch.cat([torch.full((450, 1), 30.0), torch.randn(450, 299)], dim=1),
        "uniform": torch.rand(450, 300) - 0.5,
    }[kind]
    grid, seen = Grid(bits, symmetric=True, mid_rise=bits == 2), Distribution.of(x, 0)
    tried, measured = [], ranges.clipping_error
    monkeypatch.setattr(ranges, "clipping_error", lambda *args: tried.append(args) or measured(*args))
    fast, error = best_clip_ratio(seen, grid)
    assert len(tried) < 30
    monkeypatch.setattr(ranges, "SMALL_TENSOR", 10**9)
    tried.clear()
    exhaustive, least = best_clip_ratio(seen, grid)
    assert len(tried) == 100
    assert (fast == exhaustive).float().mean() >= 0.9
    assert (error <= 1.02 * least).all() and error.mean() <= 1.001 * least.mean()


def snr(x: Tensor, grid: Grid, bounds: tuple[Tensor, Tensor]) -> float:
    """In decibels, of one tensor, in NumPy from the definition."""
    values, (lower, upper) = x.double().numpy(), (bound.item() for bound in bounds)
    step = (upper - lower) / (2**grid.bits - (not grid.mid_rise))
    zero = max(round(-lower / step), int(grid.mid_rise)) - 0.5 * grid.mid_rise
    codes = np.clip(np.round(values / step + zero), 0, 2**grid.bits - 1)
    return float(10 * np.log10((values**2).sum() / (((codes - zero) * step - values) ** 2).sum()))


def after_gelu(x: Tensor) -> Tensor:
    """Down to -0.17, up to 3."""
    return torch.nn.functional.gelu(0.7 * x - 0.3)


@pytest.mark.parametrize(
    ("make", "bits", "mid_rise", "at_least", "gain"),
    [
        (lambda x: x, 2, True, 9.0, 0.7),  # a normal distribution's best four levels, at equal steps, give 9.25 dB
        (torch.relu, 2, False, 9.0, 0.0),
        (after_gelu, 2, True, 8.5, 1.5),
        (after_gelu, 3, True, 14.0, 5.0),
        (after_gelu, 3, None, 0.0, 4.0),  # zero on a code: bounds of their own alone
    ],
)
def test_the_grid_and_the_bounds_of_least_error(
    make: Any, bits: int, mid_rise: bool | None, at_least: float, gain: float
) -> None:
    x = make(torch.randn(100_000))
    seen, affine = observe(x), Grid(bits, symmetric=False, mid_rise=False)
    grid = affine
    if mid_rise is not None:
        grid = ranges.least_error_grid(seen, affine)
        assert grid == replace(affine, mid_rise=mid_rise)
    ratio, _ = best_clip_ratio(seen, affine)
    found, before = snr(x, grid, best_bounds(seen, grid)), snr(x, affine, (seen.minimum * ratio, seen.maximum * ratio))
    assert found >= at_least and found >= before + gain


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zero_lies_between_two_codes_of_an_affine_mid_rise_grid(bits: int) -> None:
    grid, codes = Grid(bits, symmetric=False, mid_rise=True), 2**bits
    bounds = torch.tensor([0.0, -1.0, -1.0, -3.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    scale, zero_point = grid.from_bounds(*bounds)
    torch.testing.assert_close(scale * codes, torch.tensor([1.0, 1.0, 2.0, 4.0]))
    assert zero_point.tolist() == [0.5, codes - 1.5, codes / 2 - 0.5, codes * 3 / 4 - 0.5]


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, True)])
def test_each_channel_has_the_bounds_that_it_would_have_alone(bits: int, symmetric: bool) -> None:
    noise = torch.randn(4, 4000)
    x = torch.stack([after_gelu(noise[0]), noise[1], torch.relu(noise[2]), noise[3]])
    x[3, 0] = 100.0
    grid = Grid(bits, symmetric, mid_rise=False)
    together = best_bounds(Distribution.of(x, 0), grid)
    for channel in range(len(x)):
        one = best_bounds(Distribution.of(x[channel], None), grid)
        assert [bound[channel] for bound in together] == [bound[0] for bound in one]


@pytest.mark.parametrize("symmetric", [False, True])
def test_of_more_bits_one_ratio_is_that_of_both_bounds(symmetric: bool) -> None:
    seen = observe(after_gelu(torch.randn(4000)))
    lower, upper = best_bounds(seen, Grid(4, symmetric=symmetric, mid_rise=False))
    torch.testing.assert_close(lower / seen.minimum, upper / seen.maximum)


def test_a_large_tensor_enters_by_an_even_subsample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "MAX_SAMPLES", 2000)
    x = torch.randn(25, 20, 96) + torch.arange(96.0)  # a stride of 24 would see four channels only
    seen = observe(x)
    assert 1500 < seen.counts.sum() <= 2000
    assert seen.maximum == x.max() and seen.mean.item() == pytest.approx(x.mean().item(), rel=1e-5)
    sampled = (seen.values * seen.counts).sum() / seen.counts.sum()
    assert sampled.item() == pytest.approx(x.mean().item(), rel=0.02)
    assert torch.equal(seen.counts, observe(x).counts)


def test_memory_does_not_grow_with_the_data() -> None:
    observer, sizes = Observer(1, None), set()
    for _ in range(3):
        sizes.add(sum(value.nbytes for value in vars(observer).values() if isinstance(value, Tensor)))
        observer.update(torch.randn(10_000))
    assert len(sizes) == 1 and max(sizes) < 100_000


@pytest.mark.parametrize(("batch", "accepted"), [([0.0, math.nan], False), ([0.0, math.inf], False), ([], True)])
def test_a_bad_or_empty_batch_leaves_no_trace(batch: list[float], accepted: bool) -> None:
    observer = Observer(1, None)
    assert observer.update(torch.tensor(batch)) is accepted and observer.distribution(CPU) is None
    assert observer.update(torch.ones(3))
    seen = observer.distribution(CPU)
    assert seen is not None and seen.maximum == 1.0
