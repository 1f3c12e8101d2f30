"""Every method against the NumPy reference: ranges, forward and backward, over generated tensors and options."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import MID_RISE, Case, calibrate, cases
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from reference import Array
from torch import Tensor

from qsam2.quantizers import Quantizer, build_quantizer, fake_quant, grid, passes
from qsam2.recipe.quantizer_specs import methods

pytestmark = pytest.mark.slow

SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
EXTENT = pytest.mark.parametrize("extent", [50, pytest.param(2000, marks=pytest.mark.prove)])
"""Number of generated cases: a case is a channel (or a tensor) with values and a range of its own."""

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOST = {torch.float32: 2.0**-22, torch.float64: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
RATIOS = np.arange(100, 0, -1) / 100


# Scale and zero point of each method, from its definition


def expected_grid(case: Case) -> tuple[Array, Array]:
    """Scale and zero point (C,), the latter not rounded."""
    if case.method in MID_RISE:
        return weight_statistics(case)
    if "offset" in case.learned:
        scale = np.exp(case.learned["log_scale"])
        beta = case.learned["offset"] * (2**case.levels.bits - 1) * first_grid(case)[0]
        return scale, case.levels.zero(beta, scale)
    if "log_scale" in case.learned:
        return np.exp(case.learned["log_scale"]), case.found[1]
    if case.method == "pact":
        clips = np.exp(case.learned["log_clips"])
        return case.levels.cover(-clips[0], clips[-1])
    if case.method == "lsc":
        return lsc_scale(case, np.exp(case.learned["log_alpha"])), case.found[1]
    if case.method == "minmax" and case.quantizer.role == "weight":
        # the kept fraction of each end is that of the first weight, the ends are those of this one
        lower, upper, low, high = first_bounds(case)
        ends, now = ((lower, low), (upper, high)), case.rows(case.x)
        kept = [np.clip(np.divide(bound, end, out=np.ones_like(end), where=end != 0), 0, 1) for bound, end in ends]
        return case.levels.cover(now.min(axis=1) * kept[0], now.max(axis=1) * kept[1])
    return first_grid(case)


def weight_statistics(case: Case) -> tuple[Array, Array]:
    rows = case.rows(case.x)
    mean_abs, rms = np.abs(rows).mean(axis=1), np.sqrt((rows**2).mean(axis=1))
    n = 2.0**case.levels.bits - 1
    if case.method == "statsq":
        scale = 2 * mean_abs / 2 ** (case.levels.bits - 1)
    elif case.method == "sawb":
        c1, c2 = reference.SAWB[case.levels.bits]
        scale = 2 * np.maximum(c1 * rms + c2 * mean_abs, rms) / n
    else:
        scale = 2 * np.tanh(np.abs(rows).max(axis=1)) / n
    return np.maximum(scale, 1e-12), np.full_like(scale, -0.5)


def first_lsc_grid(case: Case) -> tuple[Array, Array]:
    """Grid of the first bounds, with alpha at least 1e-3."""
    lower, upper, _, _ = first_bounds(case)
    scale, zero_point = case.levels.cover(lower, upper)
    return np.maximum(scale, lsc_scale(case, np.full_like(scale, 1e-3))), zero_point


def lsc_scale(case: Case, alpha: Array) -> Array:
    """alpha deviations are Qp steps of a symmetric grid (mid-rise: to the outer edge), half of an affine one's."""
    steps = case.levels.cells / 2 if not case.levels.symmetric else case.levels.largest + 0.5 * case.levels.mid_rise
    return alpha * lsc_deviation(case) / steps


def lsc_deviation(case: Case) -> Array:
    rows = case.first_rows()
    return np.maximum(np.maximum(rows.std(axis=1), 1e-3 * np.abs(rows.mean(axis=1))), 1e-12)


def first_bounds(case: Case) -> tuple[Array, Array, Array, Array]:
    """Bounds that the search of the spec's `range` gives, and the extremes that it began with."""
    spec: Any = case.quantizer.spec
    rows = case.first_rows()
    values = rows if case.quantizer.role == "weight" else reference.as_observed(rows)
    low, high = np.minimum(rows.min(axis=1), 0.0), np.maximum(rows.max(axis=1), 0.0)
    if spec.range == "minmax":
        return low, high, low, high
    if spec.range == "percentile":
        return *reference.percentile(values, spec.percentile, case.levels.symmetric), low, high
    ratio = searched_ratio(case, values, low, high)
    if spec.range == "mse" and not case.levels.symmetric and case.levels.bits <= 3:
        return *own_ratios(case, values, low, high, ratio), low, high
    return low * ratio, high * ratio, low, high


def own_ratios(case: Case, values: Array, low: Array, high: Array, ratio: Array) -> tuple[Array, Array]:
    """The bounds (C,), hundredths of `low` and `high`, nearest to what was found, if better than one `ratio` (C,)."""
    lower, upper = RATIOS[:, None, None] * low, RATIOS[:, None] * high  # (100, 1, C), (100, C)
    scale, zero_point = case.levels.cover(lower, upper)
    other_zero = np.abs(zero_point - case.found[1]) > 0.5 + 1e-3
    pair = (np.abs(np.log(scale / case.found[0])) + 10.0 * other_zero).reshape(-1, len(low)).argmin(axis=0)
    bounds = low * RATIOS[pair // 100], high * RATIOS[pair % 100]
    own, one = (
        reference.clipping_error(values, *case.levels.cover(*each), case.levels)
        for each in (bounds, (low * ratio, high * ratio))
    )
    assert (own <= one * (1 + 1e-3) + 1e-12).all()
    return bounds


def searched_ratio(case: Case, values: Array, low: Array, high: Array) -> Array:
    """The best (C,) of the hundred ratios of the bounds `low` and `high` (C,), for values (C, n)."""
    spec: Any = case.quantizer.spec
    bounds = [(low.astype("f4") * np.float32(ratio), high.astype("f4") * np.float32(ratio)) for ratio in RATIOS]
    grids = [case.levels.cover(*(bound.astype(float) for bound in each)) for each in bounds]
    if spec.range == "mse":
        loss = np.array([reference.clipping_error(values, *each, case.levels) for each in grids])
    else:
        rows = [zip(values, *each, strict=True) for each in bounds]
        loss = np.array([[reference.divergence(*row, case.levels) for row in of_ratio] for of_ratio in rows])
    # among those that float32 cannot tell apart, that of what the quantizer found
    equal = loss <= loss.min(axis=0) * (1 + 1e-4) + 1e-12
    distance = np.abs(np.log(np.array([scale for scale, _ in grids]) / case.found[0]))
    return RATIOS[np.where(equal, distance, np.inf).argmin(axis=0)]


def first_grid(case: Case) -> tuple[Array, Array]:
    """Scale and zero point that calibration starts from, of methods that start from bounds."""
    spec: Any = case.quantizer.spec
    rows, bits = case.first_rows(), case.levels.bits
    if spec.range == "mean_abs":
        scale = 2 * np.abs(rows).mean(axis=1) / np.sqrt(case.levels.largest)
        symmetric = np.full_like(scale, -0.5 * case.levels.mid_rise)
        return scale, symmetric if case.levels.symmetric else case.levels.zero(rows.min(axis=1), scale)
    if spec.range == "three_sigma":
        lower, upper = rows.mean(axis=1) - 3 * rows.std(axis=1), rows.mean(axis=1) + 3 * rows.std(axis=1)
        if case.quantizer.role == "weight":
            return np.maximum(np.abs(lower), np.abs(upper)) / 2 ** (bits - 1), case.levels.cover(lower, upper)[1]
        return case.levels.cover(lower, upper)
    lower, upper, _, _ = first_bounds(case)
    if case.method == "pact":  # a side without data is nearly zero
        lower, upper = np.minimum(lower, -1e-12), np.maximum(upper, 1e-12)
    return case.levels.cover(lower, upper)


# Forward


def assert_grid(case: Case, found: tuple[Array, Array], expected: tuple[Array, Array]) -> None:
    std = lsc_deviation(case)
    # float32's E[x^2] - E[x]^2
    tolerance = 3e-5 + (1e-6 * (case.first_rows().mean(axis=1) / std) ** 2 if case.method == "lsc" else 0.0)
    assert (np.abs(found[0] / expected[0] - 1) <= tolerance).all()
    if case.levels.symmetric:
        np.testing.assert_array_equal(found[1], expected[1])
    else:  # an integer or between two, and the nearest one
        np.testing.assert_array_equal(found[1], case.levels.rounded(found[1]))
        assert (np.abs(found[1] - expected[1]) <= 0.5 + 1e-2).all()


@EXTENT
@pytest.mark.parametrize("method", methods())
def test_range_and_forward(method: str, extent: int) -> None:
    counted = 0

    @settings(SETTINGS, max_examples=max(extent // 10, 8))
    @given(cases(method, DTYPES))
    def check(case: Case) -> None:
        nonlocal counted
        quantizer = case.quantizer
        counted += quantizer.num_channels
        if method == "lsc":
            assert_grid(case, case.found, first_lsc_grid(case))
        elif method not in MID_RISE:
            assert_grid(case, case.found, first_grid(case))
        out = quantizer(case.x)
        scale, zero_point = quantizer.scale.double().numpy(), quantizer.zero_point.double().numpy()
        assert_grid(case, (scale, zero_point), expected_grid(case))

        rows = case.rows(case.x)
        rows = np.tanh(rows) if method == "dorefa" else rows
        expected = reference.quantize(rows, scale, zero_point, case.levels)
        actual = case.rows(out)
        off = np.abs(actual - expected)
        # the output's own rounding; fp16 below its normal range
        lost = LOST[case.x.dtype] * np.maximum(np.abs(actual), np.abs(expected)) + 1e-7
        steps = rows / scale[:, None] - 0.5 * case.levels.mid_rise
        tie = np.abs(steps - np.floor(steps) - 0.5) <= 1e-6 * np.maximum(np.abs(steps), 1)
        assert (off <= lost + tie * scale[:, None] * (1 + 1e-6)).all()
        assert out.dtype == case.x.dtype and out.shape == case.x.shape

    for start in itertools.count():
        if counted >= extent:
            break
        seed(start)(check)()


# Backward


def on_exact_residuals(case: Case, seed: int) -> Tensor:
    """A tensor whose distances from the levels are whole steps of what the saved byte holds; no ties, no edges."""
    levels, generator = case.levels, np.random.default_rng(seed)
    x = case.x.double()
    low, high = levels.first - case.found[1].max() - 3, levels.last - case.found[1].min() + 3
    steps = np.floor(generator.uniform(low, high, x.shape)) + 0.5 * levels.mid_rise
    steps += generator.integers(1, 125, x.shape) * generator.choice([-1, 1], x.shape) / passes.RESIDUAL_STEPS
    shape = fake_quant.broadcast_shape(case.quantizer.num_channels, x.ndim, case.quantizer.channel_dim)
    return torch.from_numpy(np.asarray(steps)) * case.quantizer.scale.view(shape)


def expected_learned(case: Case, of: reference.Gradients, scale: Array, zero_point: Array) -> dict[str, Array]:
    """Gradients of the learned parameters from those of scale and zero point, by the chain rule."""
    n, of_log = case.levels.cells, of.scale * scale  # of what the scale is proportional to
    if "offset" in case.learned:
        first_range = case.quantizer.first_range.numpy()  # type: ignore[operator]
        beta = case.learned["offset"] * first_range  # zero_point = [-beta / scale]
        return {"log_scale": of_log + of.zero_point * beta / scale, "offset": of.zero_point * -first_range / scale}
    if case.method == "pact" and not case.levels.symmetric:
        clips = np.exp(case.learned["log_clips"])
        lower = of.scale / n + of.zero_point * (1 / scale - clips[0] / (scale**2 * n))
        upper = of.scale / n - of.zero_point * clips[0] / (scale**2 * n)
        return {"log_clips": np.stack([lower, upper]) * clips}
    return {name: of_log[None] if name == "log_clips" else of_log for name in case.learned}


@EXTENT
@pytest.mark.parametrize("method", methods())
def test_backward(method: str, extent: int) -> None:
    @settings(SETTINGS, max_examples=max(extent // 25, 8))
    @given(cases(method, [torch.float64]), st.integers(0, 2**32), st.booleans())
    def check(case: Case, draw: int, identity: bool) -> None:
        quantizer = case.quantizer.double()
        quantizer.spec = quantizer.spec.model_copy(update={"clipped_gradient": "identity" if identity else "zero"})
        learns = bool(quantizer.learned_parameters())
        x = on_exact_residuals(case, draw) if learns else case.x.clone()
        x.requires_grad_()
        out = quantizer(x)
        scale, zero_point = quantizer.scale.numpy(), quantizer.zero_point.numpy()

        rows = case.rows(x)
        squashed = np.tanh(rows) if method == "dorefa" else rows
        steps = squashed / scale[:, None]
        low, high = (code - zero_point[:, None] for code in (case.levels.first, case.levels.last))
        half = 0.5 * case.levels.mid_rise
        unsure = np.minimum(np.abs(steps - low + half), np.abs(steps - high - half)) < 1e-5
        weight = case.quantizer.role == "weight"
        upstream = torch.from_numpy(np.random.default_rng(draw).normal(size=tuple(x.shape)))
        upstream = upstream * to_tensor(~unsure, case)
        options = {"samples": 1 if weight else len(x), "identity": identity, "residual": method != "pact"}
        expected = reference.gradients(squashed, case.rows(upstream), scale, zero_point, case.levels, **options)
        out.backward(upstream)
        slope = 1 - squashed**2 if method == "dorefa" else 1.0
        assert x.grad is not None
        np.testing.assert_allclose(case.rows(x.grad), expected.x * slope, rtol=1e-6, atol=1e-9)
        learned = expected_learned(case, expected, scale, zero_point)
        assert learned.keys() == {name for name, _ in quantizer.named_parameters()}
        for name, parameter in quantizer.named_parameters():
            size = max(np.abs(learned[name]).max(), scale.max())
            assert parameter.grad is not None
            np.testing.assert_allclose(parameter.grad.numpy() / size, learned[name] / size, atol=1e-6, err_msg=name)

    check()


def to_tensor(rows: Array, case: Case) -> Tensor:
    """Rows (C, n) in the shape of the case's tensor."""
    dim = case.quantizer._observed_dim
    if dim is None:
        return torch.from_numpy(rows).reshape(case.x.shape)
    return torch.from_numpy(rows).reshape(case.x.movedim(dim, 0).shape).movedim(0, dim)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", methods())
def test_gradcheck_with_rounding_taken_out(
    monkeypatch: pytest.MonkeyPatch, method: str, symmetric: bool, granularity: str
) -> None:
    """Numerical derivatives of a whole method, statistics held; without StatsQ's clipped weights, whose slope is 0."""
    values: dict[str, Any] = {"bits": 3, "granularity": granularity}
    if method not in (*MID_RISE, "lsq_plus", "seq"):
        values["symmetric"] = symmetric
    elif symmetric:
        pytest.skip("this method has one kind of grid in each role")
    if method == "pact":
        values["decay"] = 0.0
    spec_type = methods()[method]
    monkeypatch.setattr(passes, "_round_", lambda t, mid_rise: t)
    monkeypatch.setattr(fake_quant, "gradient_scale", lambda elements, largest_level: 1.0)
    monkeypatch.setattr(grid, "round_through", lambda x, low, high: x)
    for role in spec_type.roles:
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(3, 40, generator=generator)
        quantizer = build_quantizer(spec_type(**values), role, num_channels=3, name="q")
        calibrate(quantizer, first)
        quantizer.double().eval()  # gradcheck writes through .data, unseen by what a training step shares
        monkeypatch.setattr(quantizer, "_update_statistics", lambda x: None)
        scale, zero_point = quantizer.scale[:, None], quantizer.zero_point[:, None]
        low, high = quantizer.qmin - zero_point, quantizer.qmax - zero_point
        where = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
        steps = low + (high - low) * where
        if method not in ("statsq", "dorefa"):
            steps = torch.cat([steps, low - 0.9 - where, high + 0.9 + where], 1)
        x = (steps * scale).expand(3, -1).clone()
        x = x.atanh() if method == "dorefa" else x
        learned = {name: value.detach().clone().requires_grad_() for name, value in quantizer.named_parameters()}

        def quantize(
            x: Tensor, *values: Tensor, quantizer: Quantizer = quantizer, names: Any = tuple(learned)
        ) -> Tensor:
            return torch.func.functional_call(quantizer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(quantize, (x.requires_grad_(), *learned.values()), eps=1e-7, atol=1e-5)
