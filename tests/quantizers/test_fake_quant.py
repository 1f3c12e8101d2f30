"""The fake-quantization operation against a NumPy reference, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam2.quantizers import grid, passes
from qsam2.quantizers.fake_quant import fake_quantize
from qsam2.quantizers.grid import Grid

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@dataclass
class Case:
    grid: Grid
    x: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    channel_dim: int
    identity: bool

    def run(self, exact: bool = True) -> torch.Tensor:
        return fake_quantize(
            self.x,
            self.scale,
            self.zero_point,
            self.grid.qmin,
            self.grid.qmax,
            channel_dim=self.channel_dim,
            mid_rise=self.grid.mid_rise,
            identity_gradient=self.identity,
            exact_gradient=exact,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["mid_tread", "mid_rise", "affine"]))
    chosen = Grid(draw(st.integers(2, 8)), kind != "affine", kind == "mid_rise")
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    channel_dim = draw(st.integers(-len(shape), len(shape) - 1))
    channels = shape[channel_dim] if draw(st.booleans()) else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    scale = 0.01 + torch.rand(channels, generator=generator)
    if kind == "affine":
        zero_point = torch.randint(chosen.qmin, chosen.qmax + 1, (channels,), generator=generator).float()
    else:
        zero_point = torch.full((channels,), -0.5 if chosen.mid_rise else 0.0)
    # from well below qmin to well above qmax, so that both clips occur
    reach = 2**chosen.bits * scale.max()
    x = (reach * (2 * torch.rand(shape, generator=generator) - 1)).to(dtype)
    if draw(st.booleans()):
        x = x.repeat_interleave(2, dim=-1)[..., ::2]  # not contiguous
    return Case(chosen, x, scale, zero_point, channel_dim, draw(st.booleans()))


def numpy_reference(case: Case, grad: np.ndarray) -> dict[str, np.ndarray]:
    """Element by element, straight from the definitions; float64."""
    x = case.x.detach().double().numpy()
    channel_dim = case.channel_dim % x.ndim
    channels = case.scale.numel()
    scales, zero_points = case.scale.detach().double().numpy(), case.zero_point.detach().double().numpy()
    out, grad_x, unsure = np.zeros_like(x), np.zeros_like(x), np.zeros(x.shape, dtype=bool)
    grad_scale, grad_zero_point = np.zeros(channels), np.zeros(channels)
    half = 0.5 if case.grid.mid_rise else 0.0
    step_gain = 1.0 / np.sqrt(x.size / channels * (case.grid.qmax + half))
    for index in np.ndindex(*x.shape):
        c = index[channel_dim] if channels > 1 else 0
        s, z = scales[c], zero_points[c]
        values = [(q - z) * s for q in range(case.grid.qmin, case.grid.qmax + 1)]
        nearest = min(values, key=lambda value: abs(value - x[index]))
        out[index] = nearest
        below, above = x[index] < values[0] - half * s, x[index] > values[-1] + half * s
        cell = abs(x[index] / s - np.floor(x[index] / s) - 0.5 + half)
        edge = min(abs(x[index] - values[0] + half * s), abs(x[index] - values[-1] - half * s)) / s
        unsure[index] = min(cell, abs(cell - 1.0), edge) < 1e-4
        if below or above:
            grad_x[index] = grad[index] if case.identity else 0.0
            grad_scale[c] += grad[index] * nearest / s * step_gain
            grad_zero_point[c] += grad[index] * -s * step_gain
        else:
            grad_x[index] = grad[index]
            grad_scale[c] += grad[index] * (nearest - x[index]) / s * step_gain
    return {"out": out, "x": grad_x, "scale": grad_scale, "zero_point": grad_zero_point, "unsure": unsure}


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_forward_is_the_nearest_grid_value(case: Case) -> None:
    expected = numpy_reference(case, np.zeros(case.x.shape))
    actual = case.run()
    assert actual.dtype == case.x.dtype and actual.shape == case.x.shape
    sure = torch.from_numpy(~expected["unsure"])
    close(actual[sure], expected["out"][sure.numpy()], EPS[case.x.dtype])
    quantum = case.scale.max().item() * (1 + 1e-6) + EPS[case.x.dtype] * np.abs(expected["out"])
    assert (np.abs(actual.double().numpy() - expected["out"]) <= quantum).all()


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_backward_agrees_with_numpy(case: Case, seed: int) -> None:
    grad = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed)).to(case.x.dtype)
    # An element on a tie or an edge may fall to either side: it takes no part.
    grad[torch.from_numpy(numpy_reference(case, np.zeros(case.x.shape))["unsure"])] = 0.0
    expected = numpy_reference(case, grad.double().numpy())
    gradients = {}
    for exact in (True, False):
        for tensor in (case.x, case.scale, case.zero_point):
            tensor.grad = None
            tensor.requires_grad_()
        case.run(exact).backward(grad)
        assert case.x.grad is not None and case.scale.grad is not None and case.zero_point.grad is not None
        gradients[exact] = case.x.grad.clone(), case.scale.grad.clone(), case.zero_point.grad.clone()
        close(gradients[exact][0], expected["x"], 1e-6)
        close(gradients[exact][2], expected["zero_point"], 1e-5)
    size = max(np.abs(expected["scale"]).max(), 1.0)
    close(gradients[True][1] / size, expected["scale"] / size, 1e-6)
    # One byte an element: at most half of 1/252 of a step is lost of each residual.
    per_step = case.x.numel() / case.scale.numel()
    gain = 1.0 / np.sqrt(per_step * case.grid.largest_level)
    lost = np.abs(gradients[False][1].double().numpy() - expected["scale"])
    assert (lost <= grad.abs().sum().item() * gain / 504 + 1e-5 * size).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck_of_bounds_with_rounding_taken_out(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, channels: int
) -> None:
    monkeypatch.setattr(passes, "_round_", lambda t, mid_rise: t)
    monkeypatch.setattr(grid, "round_through", lambda x, low, high: x)
    chosen = Grid(3, symmetric, mid_rise=False)
    x = 3 * torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower, upper = -1.0 - torch.rand(channels, dtype=torch.float64), 1.1 + torch.rand(channels, dtype=torch.float64)
    gain = 1.0 / np.sqrt(x.numel() / channels * chosen.largest_level)

    def quantize(x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        scale, zero_point = (
            value / gain - (value / gain - value).detach() for value in chosen.from_bounds(lower, upper)
        )  # undoes LSQ's scaling of gradients
        return fake_quantize(x, scale, zero_point, chosen.qmin, chosen.qmax)

    assert torch.autograd.gradcheck(
        quantize, (x.requires_grad_(), lower.requires_grad_(), upper.requires_grad_()), eps=1e-7
    )


def test_pact_gradients_reach_the_bounds() -> None:
    """Two-sided PACT: a bound gets the sum of the gradients of what it clips (rounding apart)."""
    chosen = Grid(8, symmetric=False, mid_rise=False)
    lower, upper = torch.tensor([-1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([-5.0, -4.0, 0.0, 7.0])
    fake_quantize(x, *chosen.from_bounds(lower, upper), chosen.qmin, chosen.qmax).sum().backward()
    gain = 1.0 / np.sqrt(4 * 255)
    assert lower.grad is not None and upper.grad is not None
    assert lower.grad.item() / gain == pytest.approx(2.0, abs=0.02)
    assert upper.grad.item() / gain == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_bit_mid_rise_has_no_zero_and_four_levels(dtype: torch.dtype) -> None:
    chosen = Grid(2, symmetric=True, mid_rise=True)
    scale, zero_point = chosen.from_bounds(torch.tensor([-2.0]), torch.tensor([1.0]))
    x = torch.linspace(-3, 3, 101).to(dtype)
    out = fake_quantize(x, scale, zero_point, chosen.qmin, chosen.qmax, mid_rise=True)
    assert out.unique().tolist() == [-1.5, -0.5, 0.5, 1.5]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.3, requires_grad=True)
    scale = torch.tensor([0.25], requires_grad=True)
    for exact in (True, False):
        out = fake_quantize(x, scale, torch.zeros(1), -8, 7, exact_gradient=exact)
        out.sum().backward()
        assert out.shape == shape
        assert torch.equal(out, torch.full(shape, 0.25))


def test_nan_is_not_hidden() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    out = fake_quantize(x, torch.tensor([0.5]), torch.zeros(1), -8, 7)
    assert out.tolist()[0] == 1.0 and out[1].isnan()
    assert out.tolist()[2:] == [3.5, -4.0]


def saved_bytes(run: object) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return saved


@pytest.mark.parametrize("learned", [True, False])
def test_activation_saves_one_byte_an_element(learned: bool) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    scale = torch.tensor([0.1], requires_grad=learned)
    saved = saved_bytes(lambda: fake_quantize(x, scale, torch.zeros(1), -8, 7, exact_gradient=False))
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) <= x.numel() + 64


def test_identity_gradient_without_a_learned_step_saves_nothing_of_the_activation() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    scale = torch.tensor([0.1])
    saved = saved_bytes(
        lambda: fake_quantize(x, scale, torch.zeros(1), -8, 7, identity_gradient=True, exact_gradient=False)
    )
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) <= 64


def test_weight_is_saved_by_reference() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    scale = torch.rand(64).add(0.1).requires_grad_()
    saved = saved_bytes(lambda: fake_quantize(weight, scale, torch.zeros(64), -8, 7))
    large = [tensor for tensor in saved if tensor.numel() == weight.numel()]
    assert [tensor.data_ptr() for tensor in large] == [weight.data_ptr()]


def test_forward_does_not_change_its_input() -> None:
    x = torch.randn(4, 5)
    before = x.clone()
    for requires_grad in (False, True):
        for exact in (True, False):
            scale = torch.ones(1, requires_grad=requires_grad)
            out = fake_quantize(x, scale, torch.zeros(1), -8, 7, exact_gradient=exact)
            if requires_grad:
                out.sum().backward()
            assert torch.equal(x, before)
