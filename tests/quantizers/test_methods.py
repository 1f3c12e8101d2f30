"""The methods: the formulas of their papers, what they follow, what they learn. `test_proof` has each in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import activation_quantizer, calibrate, specs, weight_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu

from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import least_divergence_ratio
from qsam2.recipe.quantizer_specs import (
    EntropySpec,
    LSCSpec,
    LSQPlusSpec,
    LSQSpec,
    MinMaxSpec,
    MSESpec,
    PACTSpec,
    PercentileSpec,
    SAWBSpec,
    SEQSpec,
    methods,
)

BITS = (2, 3, 4, 8)


@st.composite
def quantized_tensors(draw: st.DrawFn) -> tuple[Quantizer, Tensor]:
    spec, role = draw(st.sampled_from(list(methods())).flatmap(specs))
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    channel_dim = draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    kinds = [x, x.abs() + 3.0, x**5, torch.full(shape, -1.7), torch.zeros(shape), x * 1e-20, x * 1e15]
    x = draw(st.sampled_from(kinds)).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    quantizer = build_quantizer(spec, role, num_channels=shape[channel_dim], channel_dim=channel_dim, name="q")
    calibrate(quantizer, x)
    return quantizer.train(draw(st.booleans())), x


@settings(max_examples=250)
@given(quantized_tensors())
def test_invariants_of_every_method(made: tuple[Quantizer, Tensor]) -> None:
    quantizer, x = made
    for state in (QuantizerState.QUANTIZE, QuantizerState.FROZEN):
        quantizer.state = state
        out, codes = quantizer(x), quantizer.to_int(x)
        assert out.dtype == x.dtype and out.isfinite().all()
        assert torch.equal(out, quantizer.dequantize(codes, x.dtype))
        assert codes.dtype == torch.int32
        assert codes.min() >= quantizer.qmin and codes.max() <= quantizer.qmax
        assert (quantizer.scale > 0).all() and quantizer.scale.isfinite().all()
        whole = quantizer.zero_point + (0.5 if quantizer.grid.mid_rise else 0.0)
        assert torch.equal(whole, whole.round())
        rows = out.movedim(quantizer.channel_dim, 0).flatten(1) if quantizer.per_channel else out.reshape(1, -1)
        assert all(row.unique().numel() <= 2**quantizer.bits for row in rows)
        if not quantizer.grid.symmetric:
            assert quantizer.zero_point.min() >= quantizer.qmin and quantizer.zero_point.max() <= quantizer.qmax
            if not quantizer.grid.mid_rise:
                assert torch.equal(quantizer(torch.zeros_like(x)), torch.zeros_like(x))
    # Quantizing what is quantized changes nothing: what finalized weights rest on.
    assert torch.equal(quantizer(out.detach()), out)


def dorefa(weight: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Equation 9, times the largest."""
    n, largest = 2**bits - 1, weight.tanh().abs().amax(1, keepdim=True)
    return largest * (2 * torch.round(n * (weight.tanh() / (2 * largest) + 0.5)) / n - 1)


def sawb(weight: Tensor, bits: int, scale: Tensor) -> Tensor:
    """IBM's code."""
    of_rms, of_mean = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 8: (31.76, -35.04)}[bits]
    clip = of_mean * weight.abs().mean(1, keepdim=True) + of_rms * weight.square().mean(1, keepdim=True).sqrt()
    n = 2**bits - 1
    return (2 * (((weight / clip).clamp(-1, 1) * 0.5 + 0.5) * n).round() / n - 1) * clip


def statsq(weight: Tensor, bits: int, scale: Tensor) -> Tensor:
    """The authors' code."""
    a, n = 2 * weight.abs().mean(1, keepdim=True), 2 ** (bits - 1)
    return a * (torch.round((weight / a).clamp(-1, 1 - 1e-6) * n - 0.5) + 0.5) / n


def seq(weight: Tensor, bits: int, scale: Tensor) -> Tensor:
    """ParetoQ's grid, at 2 bits."""
    n = 2 ** (bits - 1)
    alpha = n * scale[:, None]
    return alpha * (torch.round((weight / alpha).clamp(-1 + 1e-6, 1 - 1e-6) * n - 0.5) + 0.5) / n


@pytest.mark.parametrize(
    ("formula", "bits"), [*((formula, bits) for formula in (dorefa, sawb, statsq) for bits in BITS), (seq, 2)]
)
def test_a_weight_is_quantized_by_the_papers_formula(formula: Callable[..., Tensor], bits: int) -> None:
    weight = torch.distributions.Laplace(0.0, 0.5).sample((4, 300)).requires_grad_()
    quantizer = weight_quantizer(methods()[formula.__name__](bits=bits), weight)
    out = quantizer(weight)
    torch.testing.assert_close(out, formula(weight.detach(), bits, quantizer.scale))
    out.sum().backward()
    assert formula is not statsq or torch.equal(weight.grad, torch.ones_like(weight))  # of clipped weights, too


@pytest.mark.parametrize("method", ["minmax", "dorefa", "sawb", "statsq"])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_weight_are_anew_at_each_forward(method: str, training: bool) -> None:
    weight = 0.001 * torch.randn(4, 50)  # where tanh is a straight line
    quantizer = weight_quantizer(methods()[method](bits=4), weight).train(training)
    before = quantizer.scale
    quantizer(2 * weight)
    torch.testing.assert_close(quantizer.scale, 2 * before, rtol=1e-3, atol=0)


def test_sawb_between_the_known_bits_and_for_equal_magnitudes() -> None:
    weight, equal = torch.randn(1, 20_000), torch.tensor([[0.5, -0.5, 0.5]])
    clips = [weight_quantizer(SAWBSpec(bits=b), weight).scale.item() * (2**b - 1) / 2 for b in range(2, 9)]
    assert clips == sorted(clips) and 1.4 < clips[0] < 1.6 and 3.5 < clips[-1] < 4.0
    for bits in range(2, 9):
        quantizer = weight_quantizer(SAWBSpec(bits=bits), equal)
        assert quantizer.scale > 0
        torch.testing.assert_close(quantizer(equal), equal, atol=0.04, rtol=0)


def test_minmax_activation_is_an_exponential_moving_average_in_training_only() -> None:
    quantizer: Any = activation_quantizer(MinMaxSpec(bits=8, momentum=0.75), torch.tensor([-1.0, 3.0]))
    second = torch.tensor([-2.0, 8.0])
    quantizer.eval()(second)
    assert quantizer.scale.item() == pytest.approx(4.0 / 255)
    quantizer.train()(second)
    assert (quantizer.minimum.item(), quantizer.maximum.item()) == pytest.approx((-1.25, 4.25))
    assert quantizer.scale.item() == pytest.approx(5.5 / 255)
    for batch in ([math.nan, 0.0], [math.inf, 0.0], []):  # an overflow of half precision in training, or no data
        quantizer(torch.tensor(batch))
        assert quantizer.scale.isfinite().all()


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_minmax_keeps_the_fraction_that_calibration_found(method: str) -> None:
    x = torch.cat([torch.linspace(-1, 1, 4000), torch.tensor([5.0])])
    quantizer = activation_quantizer(MinMaxSpec(bits=4, range=method, percentile=99.0, momentum=0.0), x)
    kept = quantizer.scale * 15
    assert kept < 5
    quantizer.train()(2 * x)
    torch.testing.assert_close(quantizer.scale * 15, 2 * kept)


def test_minmax_of_positive_data_follows_to_the_other_side_of_zero() -> None:
    quantizer = activation_quantizer(MinMaxSpec(bits=4, momentum=0.0), torch.tensor([1.0, 3.0])).train()
    assert quantizer(torch.tensor([-3.0, 3.0])).tolist() == pytest.approx([-3.2, 2.8])


@pytest.mark.parametrize("spec", [PercentileSpec(bits=4, percentile=99.0), MSESpec(bits=4), EntropySpec(bits=4)])
def test_a_static_range_stays(spec: Any) -> None:
    """It is the range that learned methods start from, and no forward moves it."""
    x = torch.distributions.StudentT(4.0).sample((20, 500))
    values = spec.model_dump(exclude={"method"})
    for make in (weight_quantizer, activation_quantizer):
        static, learned = make(spec, x), make(LSQSpec(**values), x)
        torch.testing.assert_close(static.scale, learned.scale)
        assert torch.equal(static.zero_point, learned.zero_point)
        before = static.scale.clone()
        static.train()(5 * x)
        static.freeze(5 * x)
        assert torch.equal(static.scale, before) and not static.learned_parameters()


def fitted_error(quantizer: Quantizer, x: Tensor, steps: int) -> float:
    """Mean square error after so many optimizer steps."""
    optimizer = torch.optim.Adam(quantizer.learned_parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        error = (quantizer(x) - x).square().mean()
        error.backward()
        optimizer.step()
    return error.item()


def test_training_lsq_lowers_the_error() -> None:
    weight = torch.randn(4, 256)
    quantizer = weight_quantizer(LSQSpec(bits=2, range="minmax"), weight)
    first = (quantizer(weight) - weight).square().mean()
    # the best four-level uniform grid has 0.1188 on a normal distribution
    assert fitted_error(quantizer, weight, 80) < min(0.6 * first, 0.15)


def test_lsq_plus_learns_where_lsq_cannot_follow() -> None:
    """Inputs that move to the other side of zero: LSQ's zero point is fixed, LSQ+ learns its offset."""
    lsq, lsq_plus = (
        fitted_error(activation_quantizer(spec(bits=4), torch.rand(200, 5)), -torch.rand(200, 5), 120)
        for spec in (LSQSpec, LSQPlusSpec)
    )
    assert lsq_plus < 0.02 * lsq


def test_seq_survives_heavy_tails_where_the_codes_start_does_not() -> None:
    weight = torch.randn(2, 1000)
    weight[:, 0] = 30.0
    errors = [
        (weight_quantizer(SEQSpec(bits=2, range=r), weight)(weight) - weight).square().mean() for r in ("mse", "minmax")
    ]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_pact_one_sided_is_the_paper(bits: int) -> None:
    x = torch.rand(50, 20) * 3
    quantizer: Any = activation_quantizer(PACTSpec(bits=bits), x).eval()
    alpha, n = 2.0, 2**bits - 1
    with torch.no_grad():
        quantizer.log_clips[1] = math.log(alpha)
    x = (x - 0.5).requires_grad_()
    out = quantizer(x)
    torch.testing.assert_close(out, torch.round(x.clamp(0, alpha) * n / alpha) * alpha / n, atol=1e-5, rtol=0)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected = grad[x > alpha].sum() * alpha / math.sqrt(20 * n)  # d y / d alpha is 1 there, 0 elsewhere
    torch.testing.assert_close(quantizer.log_clips.grad[1], expected[None], rtol=1e-4, atol=1e-6)
    assert quantizer.log_clips.grad[0].abs() < 1e-9  # the closed side stays closed
    assert torch.equal(x.grad, grad * ((x >= 0) & (x <= alpha)))


def test_pact_penalty_is_the_gradient_of_its_square_in_training() -> None:
    x = torch.randn(4, 10)
    quantizer: Any = activation_quantizer(PACTSpec(bits=4, decay=0.25), x)
    gradients = []
    for training in (True, False):
        quantizer.zero_grad()
        quantizer.train(training)(x).sum().backward()
        gradients.append(quantizer.log_clips.grad.clone())
    penalty = 0.25 * 2 * quantizer.log_clips.detach().exp().square() / math.sqrt(10 * 15)
    torch.testing.assert_close(gradients[0] - gradients[1], penalty, rtol=1e-4, atol=1e-6)


def test_lsc_spends_its_codes_on_both_sides_of_a_skewed_activation() -> None:
    x = gelu(torch.randn(50_000) * 2)
    assert len(activation_quantizer(LSCSpec(bits=4), x).to_int(x).unique()) == 16


def test_lsc_zero_point_stays_where_calibration_found_it() -> None:
    """The output of a GELU ends at -0.17 whatever its mean: a lower bound that moves with the mean loses that end."""
    first, later = (gelu(torch.randn(20_000) + shift) for shift in (-0.5, 0.5))
    quantizer = activation_quantizer(LSCSpec(bits=4, momentum=0.0), first).train()
    zero, scale = quantizer.zero_point, quantizer.scale
    assert zero >= 1
    with torch.no_grad():
        quantizer(later)
    assert quantizer.zero_point == zero and quantizer.scale > 1.2 * scale


@pytest.mark.parametrize(
    ("momentum", "activations", "weights"), [(None, False, True), (0.99, True, True), (1.0, False, False)]
)
def test_lsc_activations_follow_only_if_told_to_and_weights_unless_told_not_to(
    momentum: float | None, activations: bool, weights: bool
) -> None:
    """Weights in ruins send values far off for as long as they are: those are to be clipped."""
    x = torch.randn(1, 1000) + 3
    for make, follows in ((activation_quantizer, activations), (weight_quantizer, weights)):
        quantizer = make(LSCSpec(bits=4, momentum=momentum), x)
        scale = quantizer.train().scale
        for _ in range(100):
            with torch.no_grad():
                quantizer(10 * x)
        assert (quantizer.scale > 5 * scale) if follows else torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("make", [activation_quantizer, weight_quantizer])
def test_lsc_follows_by_momentum_in_training_only(make: Callable[..., Any]) -> None:
    x, y = torch.randn(1, 50), torch.randn(1, 50) * 3 + 1
    quantizer = make(LSCSpec(bits=4, momentum=0.9), x)
    quantizer.eval()(y)
    torch.testing.assert_close(quantizer.mean, x.mean()[None])
    quantizer.train()(y)
    torch.testing.assert_close(quantizer.mean, (0.9 * x.mean() + 0.1 * y.mean())[None])
    pooled = 0.9 * x.square().mean() + 0.1 * y.square().mean() - quantizer.mean.square()
    torch.testing.assert_close(quantizer.std, pooled.sqrt())


def test_lsc_deviation_stays_where_batches_differ_in_their_mean() -> None:
    batches = [torch.randn(100) * 0.1 + shift for shift in torch.linspace(-2, 2, 200)[torch.randperm(200)]]
    calibrated = torch.cat(batches)
    quantizer: Any = activation_quantizer(LSCSpec(bits=4, momentum=0.99), calibrated)
    for batch in batches:
        quantizer.train()(batch)
    assert 0.85 < float(quantizer.std / calibrated.std()) < 1.1
    finite = quantizer.std.clone()
    quantizer(torch.full((3,), torch.inf))
    assert quantizer.std == finite


TAILS: dict[str, Callable[[], Tensor]] = {
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
    "student": lambda: torch.distributions.StudentT(3.0).sample((20_000,)),
    "gelu": lambda: gelu(2 * torch.randn(20_000)),
    "softmax": lambda: torch.softmax(3 * torch.randn(200, 100), 1).flatten(),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tail", TAILS)
def test_entropy_clips_a_tail_as_its_equation_says(tail: str, bits: int, symmetric: bool) -> None:
    x = TAILS[tail]()
    found = least_divergence_ratio(Distribution.of(x, None), Grid(bits, symmetric, False))
    values, levels = x.numpy().astype(float), reference.Levels(bits, symmetric, False)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    bounds = [(float(low * step / 100), float(high * step / 100)) for step in range(100, 0, -1)]
    losses = np.array([reference.divergence(values, *each, levels) for each in bounds])
    assert losses[100 - round(100 * float(found))] <= losses.min() * (1 + 1e-9)


@pytest.mark.parametrize("tail", [torch.linspace(-1, 4, 1000), torch.linspace(0, 4, 1000)], ids=["signed", "positive"])
def test_entropy_keeps_what_most_values_are(tail: Tensor) -> None:
    x = torch.cat([torch.full((50_000,), 3.0), tail])  # as a mask's background: clipping all of it would cost nothing
    quantizer = activation_quantizer(EntropySpec(bits=4, symmetric=False), x)
    assert (quantizer(x)[:50_000] - 3).abs().max() < 0.4


def test_entropy_leaves_out_a_thin_tail_of_many_values() -> None:
    x = torch.cat([torch.randn(200_000), torch.linspace(8, 40, 20)])
    kept, flat = (
        activation_quantizer(EntropySpec(bits=8, symmetric=True), each).scale * 127 for each in (x, torch.rand(200_000))
    )
    assert 3 < kept < 20 and flat > 0.95
