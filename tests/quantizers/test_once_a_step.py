"""The range of a training step: one for all calls of a quantizer, gradients included; statistics follow after it."""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
from cases import activation_quantizer, weight_quantizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsam2.layers.weight import QuantLinear
from qsam2.quantizers import Quantizer, passes
from qsam2.quantizers.fake_quant import EAGER, Kernels, use_kernels
from qsam2.quantizers.kernels import choose_kernels, compiled_kernels
from qsam2.quantizers.observers import sums
from qsam2.recipe.quantizer_specs import LSCSpec, LSQPlusSpec, LSQSpec, MinMaxSpec, PACTSpec, QuantizerSpec

LEARNED: list[QuantizerSpec] = [
    LSQSpec(bits=4), LSQPlusSpec(bits=4), PACTSpec(bits=4, decay=0.0), LSCSpec(bits=4, momentum=0.5)
]  # fmt: skip
FRAMES = (1.0, 3.0, 0.2)


def frames() -> list[Tensor]:
    x = torch.randn(6, 8)
    return [(factor * x).requires_grad_() for factor in FRAMES]


def grads(quantizer: Quantizer) -> list[Tensor]:
    found = [parameter.grad for parameter in quantizer.learned_parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


@pytest.mark.parametrize("spec", LEARNED, ids=lambda spec: spec.method)
def test_all_calls_of_a_step_share_a_range(spec: QuantizerSpec) -> None:
    quantizer = activation_quantizer(spec, torch.randn(6, 8)).train()
    scale, zero_point = quantizer.scale, quantizer.zero_point
    calls = frames()
    outs = [quantizer(x) for x in calls]
    assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)
    assert all(torch.equal(out, quantizer.dequantize(quantizer.to_int(x))) for out, x in zip(outs, calls, strict=True))
    sum(out.square().sum() for out in outs).backward()
    assert quantizer._shared is None


@pytest.mark.parametrize("spec", LEARNED, ids=lambda spec: spec.method)
def test_the_gradient_of_a_shared_range_is_the_sum_of_its_calls(spec: QuantizerSpec) -> None:
    quantizer = activation_quantizer(spec, torch.randn(6, 8)).eval()  # shares nothing, and statistics stand still
    calls = frames()
    for x in calls:
        quantizer(x).square().sum().backward()
    expected = grads(quantizer)
    quantizer.train().zero_grad()
    sum(quantizer(x).square().sum() for x in calls).backward()
    torch.testing.assert_close(grads(quantizer), expected)


def test_what_a_step_has_seen_counts_from_the_next_on() -> None:
    quantizer = activation_quantizer(LSCSpec(bits=4, momentum=0.5), torch.randn(200, 8)).train()
    first = quantizer.scale.clone()
    optimizer = torch.optim.SGD(quantizer.learned_parameters(), lr=0.0)
    for _ in range(2):
        quantizer(5 * torch.randn(200, 8, requires_grad=True)).sum().backward(retain_graph=True)
        optimizer.step()
    x = 5 * torch.randn(200, 8, requires_grad=True)
    outs = [quantizer(x), quantizer(3 * x)]
    now = quantizer.scale
    assert (now > 2 * first).all() and torch.equal(quantizer.scale, now)
    assert all(out.unique().numel() <= 16 and torch.equal((out / now).round() * now, out) for out in outs)
    later = quantizer.eval().scale
    assert (later > 1.2 * now).all()  # inference and freezing go by what was seen last
    quantizer.freeze()
    assert torch.equal(quantizer.scale, later)


def test_a_parameter_that_changed_gives_a_new_range() -> None:
    quantizer = activation_quantizer(LSQSpec(bits=4), torch.randn(50)).train()
    x = torch.randn(50, requires_grad=True)
    quantizer(x)
    first = quantizer.scale
    with torch.no_grad():
        quantizer.learned_parameters()[0].add_(1.0)
    quantizer(x)
    assert quantizer._shared is not None
    torch.testing.assert_close(quantizer._shared[0].detach(), first * math.e)


@pytest.mark.parametrize("spec", [LSQSpec(bits=4), MinMaxSpec(bits=4)])
def test_inference_and_unlearned_ranges_share_nothing(spec: QuantizerSpec) -> None:
    quantizer = activation_quantizer(spec, torch.randn(50)).train()
    with torch.no_grad():
        quantizer(torch.randn(50))
    assert quantizer._shared is None
    quantizer.train(spec.method == "minmax")(torch.randn(50, requires_grad=True))
    assert quantizer._shared is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_calls_get_their_range_again(use_reentrant: bool) -> None:
    """Statistics move from call to call: without a shared range what is recomputed would be quantized by later ones."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        spec = LSCSpec(bits=4, momentum=0.5)
        linear, x = nn.Linear(8, 4), torch.randn(5, 8)
        layer = QuantLinear.from_float(
            linear, weight_quantizer(spec, linear.weight), activation_quantizer(spec, x)
        ).train()
        clicks = [(factor * x).requires_grad_() for factor in FRAMES]
        run = partial(checkpoint, layer, use_reentrant=use_reentrant) if recompute else layer
        sum(run(y).square().sum() for y in clicks).backward()
        statistics = [value for name, value in layer.state_dict().items() if name.endswith(("mean", "std"))]
        assert len(statistics) == 4  # counted once, whether calls are repeated or not
        # a reentrant checkpoint computes without a graph, and so without a shared range: its gradients are others
        gradients = [] if use_reentrant else [p.grad for p in layer.parameters()] + [y.grad for y in clicks]
        found.append(statistics + gradients)
    torch.testing.assert_close(*found)


def test_a_clip_that_is_changed_before_backward_is_refused() -> None:
    quantizer = activation_quantizer(LSCSpec(bits=4), torch.randn(50)).train()
    out = quantizer(torch.randn(50, requires_grad=True))
    with torch.no_grad():
        quantizer.learned_parameters()[0].add_(1.0)
    with pytest.raises(RuntimeError, match="a parameter of a quantized layer was changed between forward and backward"):
        out.sum().backward()


def test_a_model_in_mid_step_is_copied_moved_and_saved() -> None:
    quantizer = activation_quantizer(LSCSpec(bits=4), torch.randn(50)).train()
    quantizer(torch.randn(50, requires_grad=True))
    assert quantizer._shared is not None
    assert copy.deepcopy(quantizer)._shared is None
    torch.save(quantizer, io.BytesIO())
    assert quantizer.double()._shared is None
    out = quantizer(torch.randn(50, requires_grad=True))
    out.sum().backward()


@pytest.fixture
def compiled() -> Kernels:
    try:
        if not choose_kernels("on", 10**6, torch.device("cpu")):
            pytest.skip("torch.compile finds no working compiler")
        return compiled_kernels()._replace(min_elements=2)
    finally:
        use_kernels(EAGER)
        choose_kernels.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_channel", [False, True])
def test_kernels_see_what_statistics_sum(
    compiled: Kernels, monkeypatch: pytest.MonkeyPatch, per_channel: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(40, 5, 33) + 2.0).to(dtype)
    dim, channels = (1, 5) if per_channel else (None, 1)
    expected, count = sums(x.double(), dim)
    view = (40, 5, 33) if per_channel else (1, 1, x.numel())
    one = torch.ones(1, channels, 1)
    assert count == x.numel() // channels
    for block in (2**18, 100):
        monkeypatch.setattr(passes, "BLOCK", block)
        for kernels in (EAGER, compiled):
            found = kernels.quantize(x.view(view), one, -8 * one, 7 * one, False, "residual", False, True)
            for ours, theirs in zip((found.total, found.square), expected, strict=True):
                torch.testing.assert_close(ours.view(-1).double(), theirs, rtol=1e-5, atol=1e-3)
    without = EAGER.quantize(x.view(view), one, -8 * one, 7 * one, False, "residual", False, False)
    assert without.total is None and without.square is None
