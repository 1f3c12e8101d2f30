"""Contestants of `qsam2 benchmark quantizers`: peers compute what we compute; how time and memory are measured."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsam2.benchmark import quantization
from qsam2.benchmark.measure import WARM_UPS, held_bytes, medians, peak_allocated_bytes, random_sam2
from qsam2.benchmark.peers import INSTALL, PEERS, Peer, choose_peers
from qsam2.benchmark.quantization import BITS, measure_operation, one_clip, quantized_models, stage_3_linear
from qsam2.layers.attention import QuantizedAttention
from qsam2.layers.convert import quantizers
from qsam2.layers.weight import QuantizedLayer, QuantLinear
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantizer_specs import LSQSpec


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brevitas", None)
    monkeypatch.setitem(sys.modules, "brevitas.nn", None)
    chosen, left_out = choose_peers(["brevitas", "aten", "aten"])
    assert [peer.name for peer in chosen] == ["aten"]
    assert left_out.keys() == {"brevitas"} and "brevitas" in left_out["brevitas"]
    assert left_out["brevitas"].endswith(f"install it with: {INSTALL}")


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    chosen, left_out = choose_peers([request.param])
    if left_out:
        pytest.skip(left_out[request.param])
    return chosen[0]


@pytest.fixture
def x() -> torch.Tensor:
    """Off centre, so that the zero point matters; one sample, whose elements count in the gradient's scale."""
    return torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 16)


@pytest.fixture
def ours(layer: nn.Linear, x: torch.Tensor) -> tuple[Quantizer, Quantizer]:
    weight = build_quantizer(LSQSpec(bits=BITS), "weight", num_channels=16)
    weight.initialize_from(layer.weight / 2)  # many a weight is clipped
    inputs = build_quantizer(LSQSpec(bits=BITS), "activation")
    inputs.state = QuantizerState.OBSERVE
    inputs(x)
    inputs.finish_observing()
    assert (inputs.zero_point > 0).all()
    return weight, inputs


def assert_same_levels(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """The same codes, but for rounding ties, where they may be one apart."""
    apart = ((found - expected) / scale).abs()
    assert (apart > 1e-3).float().mean() < 0.01
    assert apart.max() < 1.001


def clear_of_the_clip(weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """A gradient that is zero within half a step of the clip: there LSQ clips values that peers round first."""
    steps = weight.detach() / quantizer.scale.view(-1, 1)
    near = ((steps - quantizer.qmax).abs() < 0.51) | ((steps - quantizer.qmin).abs() < 0.51)
    assert ((steps > quantizer.qmax) & ~near).any() and ((steps < quantizer.qmin) & ~near).any()
    return torch.randn(weight.shape).masked_fill(near, 0.0)


def test_a_peer_computes_what_we_compute(
    peer: Peer, layer: nn.Linear, x: torch.Tensor, ours: tuple[Quantizer, Quantizer]
) -> None:
    """Ours learns the logarithm of a step. Brevitas and torchao do not scale its gradient by 1/sqrt(N Qp)."""
    weight_quantizer, input_quantizer = ours
    twin = peer.linear(layer, *ours)
    their_weight, their_input = peer.quantizers(twin)
    w, x = layer.weight.detach().clone().requires_grad_(), x.clone().requires_grad_()
    weight, found = their_weight(w), their_input(x)
    assert_same_levels(weight, weight_quantizer(w), weight_quantizer.scale.view(-1, 1))
    if peer.name == "torchao":  # a token has the range of its own values and zero: all of them are inside
        range_ = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        assert ((found - x).abs() <= 1.01 * range_ / (2**BITS - 1)).all()
        assert all(len(token.unique()) <= 2**BITS for token in found[0])
    else:
        assert_same_levels(found, input_quantizer(x), input_quantizer.scale)
    torch.testing.assert_close(twin(x), F.linear(found, weight, layer.bias))

    gradient = clear_of_the_clip(w, weight_quantizer)
    (theirs,) = torch.autograd.grad(weight, w, gradient)
    (expected,) = torch.autograd.grad(weight_quantizer(w), w, gradient)
    torch.testing.assert_close(theirs, expected)

    weight_quantizer(w.detach()).backward(gradient)
    their_weight(w.detach()).backward(gradient)
    (learned,) = (value for value in twin.parameters() if value.grad is not None)
    theirs = learned.grad.flatten() * weight_quantizer.scale
    if peer.name == "brevitas":
        theirs = theirs * 2 ** (BITS - 1)  # its parameter is that many steps
    if peer.name in ("brevitas", "torchao"):
        theirs = theirs / (32 * (2 ** (BITS - 1) - 1)) ** 0.5
    torch.testing.assert_close(theirs, weight_quantizer.learned_parameters()[0].grad, rtol=1e-4, atol=1e-6)


def test_the_models_quantize_what_they_say() -> None:
    model = random_sam2("nano", 64)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    names = dict(model.named_parameters()).keys()
    chosen, _ = choose_peers(list(PEERS))
    models = quantized_models(model, one_clip(2, 64), chosen)
    assert models.keys() == {"qsam2", "qsam2_linear", *(peer.name for peer in chosen)}
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == linears

    full, linear_only = models.pop("qsam2"), models.pop("qsam2_linear")
    quantized = QuantizedLayer, QuantizedAttention
    kinds = [type(module) for module in full.modules() if isinstance(module, quantized)]
    assert kinds.count(QuantLinear) == len(linears) < len(kinds)
    assert {name for name, module in linear_only.named_modules() if isinstance(module, quantized)} == linears
    for name, quantizer in quantizers(linear_only):
        assert quantizer.state is QuantizerState.QUANTIZE
        assert torch.equal(quantizer.scale, full.get_submodule(name).scale)
    for theirs in models.values():
        assert not [name for name, module in theirs.named_modules() if type(module) is nn.Linear]
        assert names <= dict(theirs.named_parameters()).keys()  # the optimizer sees all weights, and their steps
        assert not {id(value) for value in theirs.parameters()} & {id(value) for value in model.parameters()}

    layer = stage_3_linear(model)
    shapes: list[Any] = []
    layer.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    with torch.no_grad():
        model.forward_image(torch.zeros(2, 3, 64, 64))
    assert shapes == [(2, 4, 4, 128)] and layer.weight.shape == (512, 128), "the third stage has stride 16"


def test_contestants_take_turns_and_warm_up() -> None:
    calls: list[str] = []

    def run(name: str) -> tuple[float, ...]:
        calls.append(name)
        return float(len(calls)), 0.5

    found = medians({name: lambda name=name: run(name) for name in "ab"}, 3, progress="test")
    assert calls == ["a", "b"] * (WARM_UPS + 3)
    first = 2 * WARM_UPS + 1  # calls of a: first, first + 2, first + 4
    assert found == {"a": (first + 2, 0.5), "b": (first + 3, 0.5)}


def test_operation_times_forward_and_backward_apart(
    layer: nn.Linear, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(quantization, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def wait(seconds: float) -> None:
        clock[0] += seconds

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wait(0.25)
            out = x * 2
            out.register_hook(lambda _: wait(0.5))
            return out

    class SlowPeer(Peer):
        name, note = "slow", ""

        def linear(self, layer: nn.Linear, weight: Quantizer, input: Quantizer) -> nn.Module:
            assert (weight.bits, weight.scale.shape, input.scale.shape) == (BITS, (16,), (1,))
            return Slow()

        def quantizers(self, twin: Any) -> tuple[Any, Any]:
            return twin, twin

    row = measure_operation(layer, x, [SlowPeer()], repeats=1)["slow"]
    for part in ("weight", "activation"):
        assert row[part] == {"forward_ms": 250, "backward_ms": 500}


def test_memory_is_that_of_the_tensors() -> None:
    before = torch.zeros(1000, 1000)
    x = torch.zeros(1000, 1000, requires_grad=True)

    def makes_four_of_which_two_live_together() -> None:
        for _ in range(3):
            before.mul(2)
        doubled = before * 2
        torch.add(doubled, 1)

    def saves_its_output() -> None:
        x.exp().exp().sum().backward()
        x.grad = None

    def saves_nothing() -> None:
        (x + 1).add(1).sum().backward()
        x.grad = None

    small_ones = peak_allocated_bytes(makes_four_of_which_two_live_together) - 2 * before.nbytes
    assert 0 <= small_ones < 1000
    assert peak_allocated_bytes(saves_its_output) > 1.4 * peak_allocated_bytes(saves_nothing)
    one = torch.zeros(10, 10)
    assert held_bytes([one, one.view(100), one[0], torch.zeros(5)]) == 400 + 20, "a shared storage counts once"
