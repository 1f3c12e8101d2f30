"""Quantizers in training: optimizer steps, one range for all calls of a step, checkpointing, compilation."""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
from cases import activation_quantizer, calibrated, weight_quantizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsam2.layers.weight import QuantLinear
from qsam2.quantizers import Quantizer
from qsam2.recipe.quantizer_specs import LSCSpec, LSQPlusSpec, LSQSpec, MinMaxSpec, PACTSpec, QuantizerSpec, methods

LEARNED = [LSQSpec(bits=4), LSQPlusSpec(bits=4), PACTSpec(bits=4, decay=0.0), LSCSpec(bits=4, momentum=0.5)]
LEARNING = [
    (methods()[method](bits=4, range="minmax"), role)
    for method in ("lsq", "lsq_plus", "pact", "seq", "lsc")
    for role in methods()[method].roles
]
FRAMES = (1.0, 3.0, 0.2)


def frames(x: Tensor) -> list[Tensor]:
    return [(factor * x).requires_grad_() for factor in FRAMES]


def grads(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def add_to_parameter(quantizer: Quantizer) -> None:
    with torch.no_grad():
        quantizer.learned_parameters()[0].add_(1.0)


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("gradient", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize(("spec", "role"), LEARNING)
def test_no_gradient_makes_a_scale_zero_negative_or_nan(
    spec: QuantizerSpec, role: str, gradient: float, lr: float, optimizer_type: type[torch.optim.Optimizer]
) -> None:
    x = torch.randn(3, 16)
    quantizer = calibrated(spec, role, x).train()
    parameters = quantizer.learned_parameters()
    optimizer = optimizer_type(parameters, lr=lr)  # type: ignore[call-arg]
    for sign in (1, 1, 1, -1, -1, -1, 1):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, sign * gradient)
        optimizer.step()
        assert (quantizer.scale > 0).all() and quantizer.scale.isfinite().all()
        assert quantizer.zero_point.isfinite().all()
        optimizer.zero_grad()
        out = quantizer(x.requires_grad_())  # wherever the step is, training goes on
        out.sum().backward()
        assert all(t.isfinite().all() for t in (out, x.grad, *grads(quantizer))) and len(grads(quantizer)) > 0


@pytest.mark.parametrize("method", [method for method, spec in methods().items() if "activation" in spec.roles])
def test_one_backward_through_several_calls_of_a_step(method: str) -> None:
    """SAM2 calls a layer once a frame: statistics move between calls whose graphs are still alive."""
    x = torch.randn(4, 8)
    quantizer, calls = activation_quantizer(methods()[method](bits=4), x).train(), frames(x)
    torch.stack([quantizer(one) for one in calls]).square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in calls)


@pytest.mark.parametrize("spec", LEARNED, ids=lambda spec: spec.method)
def test_all_calls_of_a_step_share_a_range_and_its_gradient(spec: QuantizerSpec) -> None:
    quantizer, calls = activation_quantizer(spec, torch.randn(6, 8)).eval(), frames(torch.randn(6, 8))
    for x in calls:  # in evaluation nothing is shared, and statistics stand still
        quantizer(x).square().sum().backward()
    expected = grads(quantizer)
    quantizer.train().zero_grad()
    scale, zero_point = quantizer.scale, quantizer.zero_point
    outs = [quantizer(x) for x in calls]
    assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)
    assert all(torch.equal(out, quantizer.dequantize(quantizer.to_int(x))) for out, x in zip(outs, calls, strict=True))
    sum(out.square().sum() for out in outs).backward()
    assert quantizer._shared is None and len(expected) > 0
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
    quantizer, x = activation_quantizer(LSQSpec(bits=4), torch.randn(50)).train(), torch.randn(50, requires_grad=True)
    quantizer(x)
    first = quantizer.scale
    add_to_parameter(quantizer)
    quantizer(x)
    assert quantizer._shared is not None
    torch.testing.assert_close(quantizer.scale, first * math.e)


@pytest.mark.parametrize("spec", [LSQSpec(bits=4), MinMaxSpec(bits=4)])
def test_inference_and_unlearned_ranges_share_nothing(spec: QuantizerSpec) -> None:
    quantizer = activation_quantizer(spec, torch.randn(50)).train()
    with torch.no_grad():
        quantizer(torch.randn(50))
    assert quantizer._shared is None
    quantizer.train(spec.method == "minmax")(torch.randn(50, requires_grad=True))
    assert quantizer._shared is None


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("spec", [LSCSpec(bits=4, momentum=0.5), MinMaxSpec(bits=4, momentum=0.5)])
def test_checkpointed_calls_count_once_and_get_their_range_again(spec: QuantizerSpec, use_reentrant: bool) -> None:
    """Statistics move from call to call: without a shared range what is recomputed would be quantized by later ones."""
    found = []
    linear, x = nn.Linear(8, 4), torch.randn(5, 8)
    for recompute in (False, True):
        quantizers = weight_quantizer(spec, linear.weight), activation_quantizer(spec, x)
        layer = QuantLinear.from_float(copy.deepcopy(linear), *quantizers).train()
        clicks = frames(x)
        run = partial(checkpoint, layer, use_reentrant=use_reentrant) if recompute else layer
        sum(run(y).square().sum() for y in clicks).backward()
        statistics = [value for name, value in layer.state_dict().items() if name.endswith(("mean", "std", "imum"))]
        assert len(statistics) >= 4
        # a reentrant checkpoint computes without a graph, and so without a shared range: its gradients are others
        shares = spec.method == "lsc" and not use_reentrant
        found.append(statistics + ([*grads(layer), *(y.grad for y in clicks)] if shares else []))
    torch.testing.assert_close(*found)


def test_a_clip_that_is_changed_before_backward_is_refused() -> None:
    quantizer = activation_quantizer(LSCSpec(bits=4), torch.randn(50)).train()
    out = quantizer(torch.randn(50, requires_grad=True))
    add_to_parameter(quantizer)
    with pytest.raises(RuntimeError, match="a parameter of a quantized layer was changed between forward and backward"):
        out.sum().backward()


def test_a_model_in_mid_step_is_copied_moved_and_saved() -> None:
    quantizer = activation_quantizer(LSCSpec(bits=4), torch.randn(50)).train()
    quantizer(torch.randn(50, requires_grad=True))
    assert quantizer._shared is not None
    assert copy.deepcopy(quantizer)._shared is None
    torch.save(quantizer, io.BytesIO())
    assert quantizer.double()._shared is None
    quantizer(torch.randn(50, requires_grad=True)).sum().backward()


def test_a_quantizer_can_be_compiled_in_one_graph() -> None:
    x = torch.randn(4, 8)
    for quantizer in (weight_quantizer(LSCSpec(bits=4), x).train(), activation_quantizer(LSQSpec(bits=4), x).train()):
        torch.testing.assert_close(torch.compile(quantizer, backend="eager", fullgraph=True)(x), quantizer(x))


def test_pact_shrinks_what_the_loss_does_not_need() -> None:
    x = torch.randn(64, 10)
    quantizer = activation_quantizer(PACTSpec(bits=4, range="minmax"), x)
    optimizer = torch.optim.Adam(quantizer.learned_parameters(), lr=0.01)
    before = quantizer.scale
    for _ in range(10):
        optimizer.zero_grad()
        (0 * quantizer(x)).sum().backward()
        optimizer.step()
    assert (quantizer.scale < 0.95 * before).all()


@pytest.mark.parametrize(("eps", "moved"), [(1e-8, 0.0), (1e-15, 1e-3)])
def test_adam_moves_a_clip_of_small_gradient_if_its_eps_is_smaller(eps: float, moved: float) -> None:
    """LSQ's 1/sqrt(N Qp) takes gradients of large activations below Adam's usual eps of 1e-8."""
    x, upstream = torch.randn(1, 2**16), 1e-9 * torch.randn(1, 2**16)
    quantizer = activation_quantizer(LSQSpec(bits=4), x)
    (parameter,) = quantizer.learned_parameters()
    before = parameter.detach().clone()
    quantizer(x).backward(upstream)
    torch.optim.AdamW([{"params": [parameter], "eps": eps}], lr=1e-3, weight_decay=0.0).step()
    assert (parameter - before).abs().item() == pytest.approx(moved, rel=0.01, abs=1e-4 if eps == 1e-8 else 0)
