"""Each method by the formula of its paper or its authors' code, and what is ours beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import activation_quantizer, weight_quantizer
from torch import Tensor

from qsam2.quantizers.clips import PACTQuantizer
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.lsq import LSQPlusQuantizer
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.ranges import least_divergence_ratio
from qsam2.recipe.quantizer_specs import (
    DoReFaSpec,
    EntropySpec,
    LSQPlusSpec,
    LSQSpec,
    MSESpec,
    PACTSpec,
    PercentileSpec,
    QuantizerSpec,
    SAWBSpec,
    SEQSpec,
    StatsQSpec,
)

BITS = (2, 3, 4, 8)
TAILS = {
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
    "student": lambda: torch.distributions.StudentT(3.0).sample((20_000,)),
    "gelu": lambda: torch.nn.functional.gelu(2 * torch.randn(20_000)),
    "softmax": lambda: torch.softmax(3 * torch.randn(200, 100), 1).flatten(),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def set_learned(parameter: Tensor, value: Tensor | float) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value))


@pytest.mark.parametrize("bits", BITS)
def test_dorefa_is_equation_9_times_the_size_of_the_weight(bits: int) -> None:
    weight = torch.randn(4, 300)
    n = 2**bits - 1
    largest = weight.tanh().abs().amax(1, keepdim=True)
    of_paper = 2 * torch.round(n * (weight.tanh() / (2 * largest) + 0.5)) / n - 1
    torch.testing.assert_close(weight_quantizer(DoReFaSpec(bits=bits), weight)(weight), largest * of_paper)


def test_dorefa_freezes_the_weight_it_computed_with() -> None:
    weight = torch.randn(4, 50)
    quantizer = weight_quantizer(DoReFaSpec(bits=3), weight)
    weight = weight * 1.5  # trained since
    before = quantizer(weight)
    quantizer.freeze(weight)
    torch.testing.assert_close(weight, weight.clamp(-1, 1))  # tanh, in place
    codes = quantizer.to_int(weight)
    assert torch.equal(quantizer.dequantize(codes), before) and torch.equal(quantizer(weight), before)
    assert torch.equal(quantizer(before), before)


def test_dorefa_in_bfloat16_squashes_in_float32() -> None:
    weight = torch.randn(2, 200).bfloat16()
    quantizer = weight_quantizer(DoReFaSpec(bits=8), weight)
    assert torch.equal(quantizer(weight), quantizer(weight.float()).bfloat16())


@pytest.mark.parametrize("bits", BITS)
def test_sawb_is_ibms_code(bits: int) -> None:
    weight = torch.distributions.Laplace(0.0, 0.02).sample((4, 300))
    of_rms, of_mean = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 8: (31.76, -35.04)}[bits]
    clip = of_mean * weight.abs().mean(1, keepdim=True) + of_rms * weight.square().mean(1, keepdim=True).sqrt()
    n = 2**bits - 1
    unit = (weight / clip).clamp(-1, 1) * 0.5 + 0.5
    torch.testing.assert_close(
        weight_quantizer(SAWBSpec(bits=bits), weight)(weight), (2 * (unit * n).round() / n - 1) * clip
    )


def test_sawb_between_the_known_bits_and_for_equal_magnitudes() -> None:
    weight = torch.randn(1, 20_000)
    clips = [weight_quantizer(SAWBSpec(bits=b), weight).scale.item() * (2**b - 1) / 2 for b in range(2, 9)]
    assert clips == sorted(clips) and 1.4 < clips[0] < 1.6 and 3.5 < clips[-1] < 4.0
    equal = torch.tensor([[0.5, -0.5, 0.5]])
    for bits in range(2, 9):
        quantizer = weight_quantizer(SAWBSpec(bits=bits), equal)
        assert quantizer.scale > 0
        torch.testing.assert_close(quantizer(equal), equal, atol=0.04, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_statsq_is_the_authors_code(bits: int) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 300))
    a = 2 * weight.detach().abs().mean(1, keepdim=True)
    n = 2 ** (bits - 1)
    expected = a * (torch.round((weight / a).clamp(-1, 1 - 1e-6) * n - 0.5) + 0.5) / n
    out = weight_quantizer(StatsQSpec(bits=bits), weight)(weight)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert (weight.abs() > a).any() and torch.equal(weight.grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [StatsQSpec(bits=2), SAWBSpec(bits=2), DoReFaSpec(bits=2)])
def test_statistics_follow_the_weight(spec: QuantizerSpec) -> None:
    weight = 0.001 * torch.randn(4, 50)  # where tanh is a straight line
    quantizer = weight_quantizer(spec, weight)
    before = quantizer.scale
    quantizer(2 * weight)
    torch.testing.assert_close(quantizer.scale, 2 * before, rtol=1e-3, atol=0)


def test_seq_is_paretoqs_grid_and_gradient() -> None:
    weight, alpha, n = torch.nn.Parameter(torch.randn(3, 400)), torch.tensor([[0.9], [1.5], [2.5]]), 2
    quantizer = weight_quantizer(SEQSpec(bits=2), weight)
    (log_scale,) = quantizer.learned_parameters()
    set_learned(log_scale, (alpha[:, 0] / n).log())
    unit = weight.detach() / alpha
    rounded = (torch.round(unit.clamp(-1 + 1e-6, 1 - 1e-6) * n - 0.5) + 0.5) / n
    out = quantizer(weight)
    torch.testing.assert_close(out, rounded * alpha)
    grad = torch.randn_like(out)
    out.backward(grad)
    outside = unit.abs() > 1
    slope = torch.where(outside, unit.sign() * 0.75, rounded - unit)  # of alpha
    expected = (slope * grad).sum(1) * alpha[:, 0] / math.sqrt(400 * 1.5)
    torch.testing.assert_close(log_scale.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, grad * ~outside)


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
    quantizer = activation_quantizer(PACTSpec(bits=bits), x).eval()
    assert isinstance(quantizer, PACTQuantizer)
    alpha, n = 2.0, 2**bits - 1
    set_learned(quantizer.log_clips[1], math.log(alpha))
    x = (x - 0.5).requires_grad_()
    out = quantizer(x)
    y = x.detach().clamp(0, alpha)
    torch.testing.assert_close(out, torch.round(y * n / alpha) * alpha / n, atol=1e-5, rtol=0)
    grad = torch.randn_like(out)
    out.backward(grad)
    at_clip = x.detach() > alpha
    expected = (grad * at_clip).sum() * alpha / math.sqrt(20 * n)  # d y / d alpha is 1 there, 0 elsewhere
    assert quantizer.log_clips.grad is not None and x.grad is not None
    torch.testing.assert_close(quantizer.log_clips.grad[1], expected[None], rtol=1e-4, atol=1e-6)
    assert quantizer.log_clips.grad[0].abs() < 1e-9  # the closed side stays closed
    assert torch.equal(x.grad, grad * ((x.detach() >= 0) & ~at_clip))


def test_pact_penalty_is_the_gradient_of_its_square_in_training() -> None:
    x = torch.randn(4, 10)
    quantizer = activation_quantizer(PACTSpec(bits=4, decay=0.25), x)
    assert isinstance(quantizer, PACTQuantizer)
    gradients = []
    for training in (True, False):
        quantizer.zero_grad()
        quantizer.train(training)(x).sum().backward()
        assert quantizer.log_clips.grad is not None
        gradients.append(quantizer.log_clips.grad.clone())
    clips = quantizer.log_clips.detach().exp()
    gain = 1 / math.sqrt(10 * 15)
    torch.testing.assert_close(gradients[0] - gradients[1], gain * 0.25 * 2 * clips.square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_lsq_plus_weights_start_at_three_sigma(bits: int) -> None:
    weight = 0.1 * torch.randn(4, 300) + 0.02
    mean, std = weight.mean(1), weight.std(1, correction=0)
    expected = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2 ** (bits - 1)
    torch.testing.assert_close(weight_quantizer(LSQPlusSpec(bits=bits), weight).scale, expected)


def test_lsq_plus_offset_is_the_papers_where_the_zero_point_is_an_integer() -> None:
    x = (torch.randn(40, 25) + 1.0).requires_grad_()
    quantizer = activation_quantizer(LSQPlusSpec(bits=8), x)
    assert isinstance(quantizer, LSQPlusQuantizer) and quantizer.offset is not None
    beta, scale = -0.75, 0.75 / 64  # a whole number of steps
    set_learned(quantizer.log_scale, math.log(scale))
    set_learned(quantizer.offset, beta / quantizer.first_range)
    steps = (x.detach() - beta) / scale
    of_paper = torch.round(steps.clamp(0, 255)) * scale + beta
    out = quantizer(x)
    torch.testing.assert_close(out, of_paper, atol=1e-5, rtol=0)
    grad = torch.randn_like(out)
    out.backward(grad)
    outside = (steps < 0) | (steps > 255)
    expected = (grad * outside).sum() * quantizer.first_range / math.sqrt(25 * 255)  # d x^ / d beta is 1 there
    torch.testing.assert_close(quantizer.offset.grad, expected, rtol=1e-3, atol=1e-4)


def test_lsq_plus_learns_where_lsq_cannot_follow() -> None:
    """Inputs that move to the other side of zero: LSQ's zero point is fixed, LSQ+ learns its offset."""
    errors = {}
    for name, spec in (("lsq", LSQSpec(bits=4)), ("lsq_plus", LSQPlusSpec(bits=4))):
        quantizer = activation_quantizer(spec, torch.rand(200, 5))
        x = -torch.rand(200, 5)
        optimizer = torch.optim.Adam(quantizer.learned_parameters(), lr=0.02)
        for _ in range(120):
            optimizer.zero_grad()
            error = (quantizer(x) - x).square().mean()
            error.backward()
            optimizer.step()
        errors[name] = error.item()
    assert errors["lsq_plus"] < 0.02 * errors["lsq"]


@pytest.mark.parametrize("spec", [PercentileSpec(bits=4, percentile=99.0), MSESpec(bits=4), EntropySpec(bits=4)])
def test_a_static_range_stays(spec: Any) -> None:
    """It is the range that learned methods start from, and no forward moves it."""
    x = torch.distributions.StudentT(4.0).sample((20, 500))
    values = spec.model_dump(exclude={"method"})
    for static, learned in (
        (weight_quantizer(spec, x), weight_quantizer(LSQSpec(**values), x)),
        (activation_quantizer(spec, x), activation_quantizer(LSQSpec(**values), x)),
    ):
        torch.testing.assert_close(static.scale, learned.scale)
        assert torch.equal(static.zero_point, learned.zero_point)
        before = static.scale.clone()
        static.train()(5 * x)
        static.freeze(5 * x)
        assert torch.equal(static.scale, before) and not static.learned_parameters()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tail", TAILS)
def test_entropy_clips_a_tail_as_its_equation_says(tail: str, bits: int, symmetric: bool) -> None:
    x = TAILS[tail]()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    grid = Grid(bits, symmetric, False)
    found = least_divergence_ratio(Distribution.of(x, None), grid)
    values, levels = x.numpy().astype(float), reference.Levels(bits, symmetric, False)
    bounds = [(float(low * step / 100), float(high * step / 100)) for step in range(100, 0, -1)]
    losses = np.array([reference.divergence(values, *each, levels) for each in bounds])
    chosen = 100 - round(100 * float(found))
    assert losses[chosen] <= losses.min() * (1 + 1e-9)


@pytest.mark.parametrize("tail", [torch.linspace(-1, 4, 1000), torch.linspace(0, 4, 1000)], ids=["signed", "positive"])
def test_entropy_keeps_what_most_values_are(tail: Tensor) -> None:
    x = torch.cat([torch.full((50_000,), 3.0), tail])  # as a mask's background: clipping all of it would cost nothing
    quantizer = activation_quantizer(EntropySpec(bits=4, symmetric=False), x)
    assert (quantizer(x)[:50_000] - 3).abs().max() < 0.4


def test_entropy_leaves_out_a_thin_tail_of_many_values() -> None:
    x = torch.cat([torch.randn(200_000), torch.linspace(8, 40, 20)])
    kept = activation_quantizer(EntropySpec(bits=8, symmetric=True), x).scale * 127
    assert 3 < kept < 20
    flat = activation_quantizer(EntropySpec(bits=8, symmetric=True), torch.rand(200_000)).scale * 127
    assert flat > 0.95
