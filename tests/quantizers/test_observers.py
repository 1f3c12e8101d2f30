"""Statistics of observers, and the ranges chosen from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsam2.quantizers import mse, observers
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.mse import best_clip_ratio
from qsam2.quantizers.observers import Distribution, Observer
from qsam2.quantizers.ranges import initial_bounds, percentile_bounds
from qsam2.recipe.quantizer_specs import LSQSpec, MinMaxSpec

CPU = torch.device("cpu")


def observe(*batches: Tensor, channel_dim: int | None = None) -> Distribution:
    observer = Observer(1 if channel_dim is None else batches[0].shape[channel_dim], channel_dim)
    for batch in batches:
        assert observer.update(batch)
    seen = observer.distribution(CPU)
    assert seen is not None
    return seen


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-8, 1.0, 1e6]), st.sampled_from([None, 0, 1, -1]))
def test_statistics_are_those_of_all_data(seed: int, size: float, channel_dim: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [size * (torch.randn(4, 5, generator=generator) * 10.0**k + k) for k in range(3)]
    seen = observe(*batches, channel_dim=channel_dim)
    joint = np.concatenate([batch.double().numpy() for batch in batches], axis=1 if channel_dim == 0 else 0)
    rows = joint[None] if channel_dim is None else np.moveaxis(joint, channel_dim, 0)
    rows = rows.reshape(len(rows), -1)
    for actual, expected in (
        (seen.minimum, rows.min(1)),
        (seen.maximum, rows.max(1)),
        (seen.mean, rows.mean(1)),
        (seen.std, rows.std(1)),
        (seen.mean_abs, np.abs(rows).mean(1)),
    ):
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-5 * size)
    assert seen.counts.sum(1).tolist() == [rows.shape[1]] * len(rows)


def test_the_order_of_batches_does_not_matter() -> None:
    batches = [torch.randn(1000) * scale for scale in (1e-3, 1.0, 0.0, 300.0, 20.0)]
    first, second = observe(*batches), observe(*reversed(batches))
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize("channel_dim", [None, 0])
def test_histogram_has_each_value_within_a_bin(channel_dim: int | None) -> None:
    x = torch.randn(2, 3000) * torch.tensor([[1.0], [7.0]])
    seen = observe(x[:, :1000], x[:, 1000:], channel_dim=channel_dim)
    rows = x.reshape(seen.counts.shape[0], -1)
    for row, values, counts in zip(rows, seen.values, seen.counts, strict=True):
        restored = torch.repeat_interleave(values, counts.long())
        width = 2 * row.abs().max() / observers.BINS_PER_SIDE
        assert (restored - row.sort().values).abs().max() <= width


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_agree_with_numpy(percentile: float, symmetric: bool) -> None:
    x = torch.randn(50_000) ** 3 + 0.5
    array = x.numpy()
    for seen in (observe(x[:20_000], x[20_000:]), Distribution.of(x, None)):
        lower, upper = percentile_bounds(seen, percentile, symmetric)
        if symmetric:
            expected = np.percentile(np.abs(array), percentile)
            expected_lower = -expected
        else:
            expected_lower, expected = np.percentile(array, [100 - percentile, percentile])
        resolution = 2 * float(np.abs(array).max()) / observers.BINS_PER_SIDE
        assert upper.item() == pytest.approx(expected, rel=2e-2, abs=resolution)
        assert lower.item() == pytest.approx(expected_lower, rel=2e-2, abs=resolution)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_is_the_best_of_the_clip_ratios(bits: int, symmetric: bool) -> None:
    x = torch.distributions.StudentT(4.0).sample((20_000,))
    spec = LSQSpec(bits=bits, symmetric=symmetric).for_role("activation")
    grid = Grid.of(spec)

    def error(ratio: float) -> float:
        """In NumPy, from the definition."""
        lower, upper = x.min().item() * ratio, x.max().item() * ratio
        if symmetric:
            step, zero = max(-lower, upper) / (2 ** (bits - 1) - 1), 0.0
        else:
            step = (upper - lower) / (2**bits - 1)
            zero = round(-lower / step)
        codes = np.clip(np.round(x.double().numpy() / step) + zero, grid.qmin, grid.qmax)
        return float((np.abs((codes - zero) * step - x.double().numpy()) ** 2.4).mean())

    best = min(error(step / 100) for step in range(1, 101))
    for seen in (observe(x), Distribution.of(x, None)):
        _, upper = initial_bounds(seen, spec, grid)
        assert error(upper.item() / x.max().item()) <= 1.01 * best


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
    tried = []

    def bounds(ratio: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(ratio)
        return seen.minimum * ratio, seen.maximum * ratio

    fast = best_clip_ratio(seen, grid, bounds)
    assert len(tried) < 30
    monkeypatch.setattr(mse, "SMALL_TENSOR", 10**9)
    tried.clear()
    exhaustive = best_clip_ratio(seen, grid, bounds)
    assert len(tried) == 100
    error, least = (mse.clipping_error(seen, grid, *bounds(ratio)) for ratio in (fast, exhaustive))
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
    ],
)
def test_the_grid_of_least_error(make: Any, bits: int, mid_rise: bool, at_least: float, gain: float) -> None:
    torch.manual_seed(0)
    x = make(torch.randn(100_000))
    seen, affine = observe(x), Grid(bits, symmetric=False, mid_rise=False)
    grid = mse.least_error_grid(seen, affine)
    assert grid == replace(affine, mid_rise=mid_rise)
    found = snr(x, grid, mse.best_bounds(seen, grid))
    ratio = best_clip_ratio(seen, affine, lambda ratio: (seen.minimum * ratio, seen.maximum * ratio))
    before = snr(x, affine, (seen.minimum * ratio, seen.maximum * ratio))
    assert found >= at_least and found >= before + gain


def test_bounds_of_their_own_where_zero_has_a_code() -> None:
    torch.manual_seed(0)
    x = after_gelu(torch.randn(100_000))
    seen, grid = observe(x), Grid(3, symmetric=False, mid_rise=False)
    ratio = best_clip_ratio(seen, grid, lambda ratio: (seen.minimum * ratio, seen.maximum * ratio))
    one = snr(x, grid, (seen.minimum * ratio, seen.maximum * ratio))
    assert snr(x, grid, mse.best_bounds(seen, grid)) >= one + 4.0


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zero_lies_between_two_codes_of_an_affine_mid_rise_grid(bits: int) -> None:
    grid = Grid(bits, symmetric=False, mid_rise=True)
    bounds = torch.tensor([0.0, -1.0, -1.0, -3.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    scale, zero_point = grid.from_bounds(*bounds)
    torch.testing.assert_close(scale * 2**bits, torch.tensor([1.0, 1.0, 2.0, 4.0]))
    codes = 2**bits
    assert zero_point.tolist() == [0.5, codes - 1.5, codes / 2 - 0.5, codes * 3 / 4 - 0.5]


@pytest.mark.parametrize("bits", [2, 3])
def test_bounds_of_their_own_a_channel(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.stack([after_gelu(torch.randn(4000)), torch.randn(4000), torch.relu(torch.randn(4000))])
    grid = Grid(bits, symmetric=False, mid_rise=False)
    together = mse.best_bounds(Distribution.of(x, 0), grid)
    for channel in range(3):
        one = mse.best_bounds(Distribution.of(x[channel], None), grid)
        assert [bound[channel] for bound in together] == [bound[0] for bound in one]


@pytest.mark.parametrize("symmetric", [False, True])
def test_of_more_bits_one_ratio_is_that_of_both_bounds(symmetric: bool) -> None:
    torch.manual_seed(0)
    seen = observe(after_gelu(torch.randn(4000)))
    lower, upper = mse.best_bounds(seen, Grid(4, symmetric=symmetric, mid_rise=False))
    torch.testing.assert_close(lower / seen.minimum, upper / seen.maximum)


def test_mse_is_found_a_channel() -> None:
    weight = torch.randn(3, 5000)
    weight[1, 0] = 100.0
    grid = Grid(4, symmetric=True, mid_rise=False)
    seen = Distribution.of(weight, 0)
    together = best_clip_ratio(seen, grid, lambda ratio: (seen.minimum * ratio, seen.maximum * ratio))
    for channel in range(3):
        one = Distribution.of(weight[channel], None)
        ratio = best_clip_ratio(one, grid, lambda ratio, one=one: (one.minimum * ratio, one.maximum * ratio))
        assert ratio == together[channel]


def test_bounds_hold_zero() -> None:
    x = torch.rand(1000) + 5
    for method in ("minmax", "percentile", "mse", "entropy"):
        spec = MinMaxSpec(bits=8, range=method).for_role("activation")
        lower, upper = initial_bounds(observe(x), spec, Grid.of(spec))
        assert lower.item() == 0.0 and upper.item() > 5.0


def test_a_large_tensor_enters_by_an_even_subsample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "MAX_SAMPLES", 2000)
    x = torch.randn(25, 20, 96) + torch.arange(96.0)  # a stride of 24 would see four channels only
    seen = observe(x)
    assert 1500 < seen.counts.sum() <= 2000
    assert seen.maximum == x.max() and seen.mean.item() == pytest.approx(x.mean().item(), rel=1e-5)
    sampled = (seen.values * seen.counts).sum() / seen.counts.sum()
    assert sampled.item() == pytest.approx(x.mean().item(), rel=0.02)
    again = observe(x)
    assert torch.equal(seen.counts, again.counts)


def test_memory_does_not_grow_with_the_data() -> None:
    observer = Observer(1, None)

    def size() -> int:
        tensors = [value for value in vars(observer).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    before = size()
    for _ in range(3):
        observer.update(torch.randn(10_000))
    assert size() == before < 100_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_leaves_no_trace(bad: float) -> None:
    observer = Observer(1, None)
    assert not observer.update(torch.tensor([0.0, bad]))
    assert observer.distribution(CPU) is None
    assert observer.update(torch.ones(3))
    seen = observer.distribution(CPU)
    assert seen is not None and seen.maximum == 1.0


def test_half_precision_is_observed_in_float32() -> None:
    x = torch.randn(10_000).bfloat16()
    torch.testing.assert_close(observe(x).std[0], x.float().std(correction=0))


def test_a_channel_that_saw_nothing_is_nothing() -> None:
    observer = Observer(1, None)
    assert observer.update(torch.zeros(0))
    assert observer.distribution(CPU) is None
