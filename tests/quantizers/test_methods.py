"""The methods: what they start from, what they follow, what they learn."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from cases import activation_quantizer, weight_quantizer
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.quantizers.calibrated import MinMaxQuantizer
from qsam2.quantizers.clips import LSCQuantizer
from qsam2.recipe.quantizer_specs import LSCSpec, LSQSpec, MinMaxSpec, QuantizerSpec, Role, methods


@st.composite
def specs(draw: st.DrawFn) -> tuple[QuantizerSpec, Role]:
    """Any method with any of its options, and a role it is for."""
    spec_type = draw(st.sampled_from(list(methods().values())))
    fields = spec_type.model_fields
    values = {"bits": draw(st.integers(2, 8)), "granularity": draw(st.sampled_from([None, "tensor", "channel"]))}
    for name in ("symmetric", "grid", "range"):
        if name in fields:
            values[name] = draw(st.sampled_from([fields[name].default, *options(fields[name].annotation)]))
    try:
        spec, role = spec_type(**values), draw(st.sampled_from(spec_type.roles))
        spec.check_role(role)
    except ValueError:
        reject()
    return spec, role


def options(annotation: object) -> list[object]:
    """The values that a field's type allows."""
    found = [option for inner in get_args(annotation) for option in options(inner) or [inner]]
    return [True, False] if annotation is bool else [option for option in found if not isinstance(option, type)]


@st.composite
def quantized_tensors(draw: st.DrawFn) -> tuple[Quantizer, Tensor]:
    spec, role = draw(specs())
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    channel_dim = draw(st.integers(-len(shape), len(shape) - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "positive", "heavy", "constant", "zero", "tiny", "large"]))
    x = torch.randn(shape, generator=generator)
    x = {
        "normal": x,
        "positive": x.abs() + 3.0,
        "heavy": x**5,
        "constant": torch.full(shape, -1.7),
        "zero": torch.zeros(shape),
        "tiny": x * 1e-20,
        "large": x * 1e15,
    }[kind]
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    quantizer = build_quantizer(spec, role, num_channels=shape[channel_dim], channel_dim=channel_dim, name="q")
    if role == "weight":
        quantizer.initialize_from(x)
    else:
        quantizer.state = QuantizerState.OBSERVE
        quantizer(x)
        quantizer.finish_observing()
    return quantizer.train(draw(st.booleans())), x


@settings(max_examples=250, deadline=None)
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


def test_minmax_weight_range_is_anew_at_each_forward() -> None:
    weight = torch.randn(3, 10)
    quantizer = weight_quantizer(MinMaxSpec(bits=4), weight)
    torch.testing.assert_close(quantizer.scale, weight.abs().amax(1) / 7)
    for training in (True, False):
        weight = weight * 3
        quantizer.train(training)(weight)
        torch.testing.assert_close(quantizer.scale, weight.abs().amax(1) / 7)


def test_minmax_activation_is_an_exponential_moving_average_in_training_only() -> None:
    first, second = torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 8.0])
    quantizer = activation_quantizer(MinMaxSpec(bits=8, momentum=0.75), first)
    quantizer.eval()(second)
    assert quantizer.scale.item() == pytest.approx(4.0 / 255)
    quantizer.train()(second)
    assert isinstance(quantizer, MinMaxQuantizer)
    assert (quantizer.minimum.item(), quantizer.maximum.item()) == pytest.approx((-1.25, 4.25))
    assert quantizer.scale.item() == pytest.approx(5.5 / 255)
    for bad in (float("nan"), float("inf")):  # an overflow of half precision in training
        quantizer(torch.tensor([bad, 0.0]))
        assert quantizer.scale.isfinite().all()
    quantizer(torch.zeros(0))
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


def test_lsq_starts_from_the_papers_step() -> None:
    weight = torch.randn(3, 50)
    quantizer = weight_quantizer(LSQSpec(bits=4, range="mean_abs"), weight)
    torch.testing.assert_close(quantizer.scale, 2 * weight.abs().mean(1) / math.sqrt(7))
    x = torch.rand(500)
    unsigned = activation_quantizer(LSQSpec(bits=4, range="mean_abs"), x)
    torch.testing.assert_close(unsigned.scale, (2 * x.mean() / math.sqrt(15))[None])
    assert unsigned.zero_point.item() == 0


def test_lsq_gradient_is_the_papers_times_the_step() -> None:
    """The parameter is log s: its gradient is s times eq. 3's, with the gradient scale 1/sqrt(N Qp)."""
    weight = torch.nn.Parameter(torch.tensor([[0.3, -0.9, 5.0, 0.0], [0.4, 0.12, -7.0, -0.35]]))
    quantizer = weight_quantizer(LSQSpec(bits=3), weight)
    scale = np.array([0.5, 0.2])
    (parameter,) = quantizer.learned_parameters()
    with torch.no_grad():
        parameter.copy_(torch.tensor(scale).log())
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 1.0, 2.0, 5.0]])
    quantizer(weight).backward(grad)
    # t = [.6, -1.8, 10, 0], [2, .6, -35, -1.75]; Qn = -4, Qp = 3
    slopes = np.array([[0.4, -0.2, 3.0, 0.0], [0.0, 0.4, -4.0, -0.25]])
    expected = (slopes * grad.numpy()).sum(1) * scale / math.sqrt(4 * 3)
    assert parameter.grad is not None
    np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-5)
    assert weight.grad is not None and weight.grad.tolist() == [[1, 2, 0, 4], [-1, 1, 0, 5]]


def test_training_lsq_lowers_the_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 256)
    quantizer = weight_quantizer(LSQSpec(bits=2, range="minmax"), weight)
    optimizer = torch.optim.Adam(quantizer.learned_parameters(), lr=0.02)
    errors = []
    for _ in range(80):
        error = (quantizer(weight) - weight).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]
    assert errors[-1] < 0.15  # the best four-level uniform grid has 0.1188 on a normal distribution


def test_lsc_bounds_and_scale() -> None:
    x = torch.randn(1000) * 2 + 1
    quantizer = activation_quantizer(LSCSpec(bits=4), x)
    assert isinstance(quantizer, LSCQuantizer)
    torch.testing.assert_close(quantizer.mean, x.mean()[None])
    torch.testing.assert_close(quantizer.std, x.std(correction=0)[None])
    torch.testing.assert_close(quantizer.scale, 2 * quantizer.log_alpha.exp() * quantizer.std / 15)
    lsq = activation_quantizer(LSQSpec(bits=4), x)
    torch.testing.assert_close(quantizer.scale, lsq.scale)
    assert quantizer.zero_point == lsq.zero_point
    for bits, steps in ((2, 2), (4, 7)):
        weight = torch.randn(3, 100)
        quantizer = weight_quantizer(LSCSpec(bits=bits), weight)
        assert isinstance(quantizer, LSCQuantizer)
        torch.testing.assert_close(quantizer.scale, quantizer.log_alpha.exp() * weight.std(1, correction=0) / steps)


def test_lsc_spends_its_codes_on_both_sides_of_a_skewed_activation() -> None:
    x = torch.nn.functional.gelu(torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 2)
    quantizer = activation_quantizer(LSCSpec(bits=4), x)
    assert len(quantizer.to_int(x).unique()) == 16


@pytest.mark.parametrize("symmetric", [True, False])
def test_lsc_alpha_starts_at_the_least_error(symmetric: bool) -> None:
    weight = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    quantizer = weight_quantizer(LSCSpec(bits=3, symmetric=symmetric), weight)

    def error() -> float:
        return (quantizer(weight) - weight).abs().pow(2.4).mean().item()

    best, start = error(), quantizer.learned_parameters()[0].detach().clone()
    for factor in (0.7, 0.85, 1.2, 1.5):
        with torch.no_grad():
            quantizer.learned_parameters()[0].copy_(start + math.log(factor))
        assert error() > best


@pytest.mark.parametrize("spec", [LSCSpec(bits=4), LSQSpec(bits=4)])
def test_gradient_of_an_activations_clip_sums_over_the_batch(spec: QuantizerSpec) -> None:
    """N counts the features of one sample: the gradient of a batch is that of its parts, whatever their sizes."""
    x, grad = torch.randn(2, 5, 7, 3)
    quantizer = activation_quantizer(spec, x).eval()
    parameter = quantizer.learned_parameters()[0]

    def gradient(chosen: slice) -> torch.Tensor:
        parameter.grad = None
        quantizer(x[chosen]).backward(grad[chosen])
        assert parameter.grad is not None
        return parameter.grad

    parts = gradient(slice(0, 1)) + gradient(slice(1, 5))
    torch.testing.assert_close(parts, gradient(slice(0, 5)))


def test_lsc_gradient_of_alpha_is_that_of_its_step() -> None:
    """d x^/d log alpha of a clipped element is its bound: `step` times the outer level on its side."""
    x = torch.cat([torch.randn(1000), torch.tensor([50.0, 60.0, -70.0])])[None].requires_grad_()
    quantizer = activation_quantizer(LSCSpec(bits=8), x).eval()
    assert isinstance(quantizer, LSCQuantizer)
    with torch.no_grad():
        quantizer.log_alpha.fill_(math.log(2.0))
    torch.testing.assert_close(quantizer.scale, 4 * quantizer.std / 255)
    grad = torch.zeros(1, 1003)
    grad[0, 1000:] = torch.tensor([1.0, 2.0, 0.5])
    quantizer(x).backward(grad)
    zero = quantizer.zero_point
    expected = ((1 + 2) * (255 - zero) + 0.5 * -zero) * quantizer.scale / math.sqrt(1003 * 255)
    assert quantizer.log_alpha.grad is not None
    torch.testing.assert_close(quantizer.log_alpha.grad, expected)


def test_lsc_zero_point_stays_where_calibration_found_it() -> None:
    """The output of a GELU ends at -0.17 whatever its mean: a lower bound that moves with the mean loses that end."""
    generator = torch.Generator().manual_seed(0)
    first, later = (torch.nn.functional.gelu(torch.randn(20_000, generator=generator) + shift) for shift in (-0.5, 0.5))
    quantizer = activation_quantizer(LSCSpec(bits=4, momentum=0.0), first).train()
    zero, scale = quantizer.zero_point, quantizer.scale
    assert zero >= 1
    with torch.no_grad():
        quantizer(later)
    assert quantizer.zero_point == zero and quantizer.scale > 1.2 * scale


def test_lsc_activations_follow_only_if_told_to_and_weights_unless_told_not_to() -> None:
    """Weights in ruins send values far off for as long as they are: those are to be clipped."""
    x = torch.randn(1000) + 3
    for momentum, activations, weights in ((None, False, True), (0.99, True, True), (1.0, False, False)):
        spec = LSCSpec(bits=4, momentum=momentum)
        for quantizer, one, follows in (
            (activation_quantizer(spec, x), x, activations),
            (weight_quantizer(spec, x[None]), x[None], weights),
        ):
            scale = quantizer.train().scale
            for _ in range(100):
                with torch.no_grad():
                    quantizer(10 * one)
            assert (quantizer.scale > 5 * scale) if follows else torch.equal(quantizer.scale, scale)


def test_lsc_follows_by_momentum_in_training_only() -> None:
    spec = LSCSpec(bits=4, momentum=0.9)
    x, y = torch.randn(50), torch.randn(50) * 3 + 1
    quantizer = activation_quantizer(spec, x)
    weight = weight_quantizer(spec, x[None])
    assert isinstance(quantizer, LSCQuantizer) and isinstance(weight, LSCQuantizer)
    for one, batch in ((quantizer, y), (weight, y[None])):
        one.eval()(batch)
        torch.testing.assert_close(one.mean, x.mean()[None])
        one.train()(batch)
        torch.testing.assert_close(one.mean, (0.9 * x.mean() + 0.1 * y.mean())[None])
        pooled = 0.9 * x.square().mean() + 0.1 * y.square().mean() - one.mean.square()
        torch.testing.assert_close(one.std, pooled.sqrt())


def test_lsc_deviation_stays_where_batches_differ_in_their_mean() -> None:
    batches = [torch.randn(100) * 0.1 + shift for shift in torch.linspace(-2, 2, 200)[torch.randperm(200)]]
    calibrated = torch.cat(batches)
    quantizer = activation_quantizer(LSCSpec(bits=4, momentum=0.99), calibrated)
    assert isinstance(quantizer, LSCQuantizer)
    for batch in batches:
        quantizer.train()(batch)
    assert 0.85 < float(quantizer.std / calibrated.std()) < 1.1
    finite = quantizer.std.clone()
    quantizer(torch.full((3,), torch.inf))
    assert quantizer.std == finite


def test_per_channel_activation() -> None:
    x = torch.randn(5, 3, 7) * torch.tensor([[1.0], [10.0], [100.0]])
    quantizer = activation_quantizer(LSQSpec(bits=4, granularity="channel"), x, num_channels=3, channel_dim=1)
    assert quantizer.scale.shape == (3,)
    assert quantizer.scale[2] > 50 * quantizer.scale[0]


@pytest.mark.parametrize("gradient", ["zero", "identity"])
def test_gradient_of_clipped_values_is_an_option(gradient: str) -> None:
    weight = torch.nn.Parameter(torch.tensor([[0.1, -0.2, 0.3, 100.0]]))
    quantizer = weight_quantizer(LSCSpec(bits=4, clipped_gradient=gradient), weight)
    with torch.no_grad():
        quantizer.learned_parameters()[0].fill_(-3.0)
    quantizer(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0, 3] == (1.0 if gradient == "identity" else 0.0)
