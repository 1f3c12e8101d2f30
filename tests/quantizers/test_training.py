"""Quantizers in training: optimizer steps, several calls per step, checkpointing, compilation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import activation_quantizer, weight_quantizer
from torch.utils.checkpoint import checkpoint

from qsam2.recipe.quantizer_specs import LSCSpec, LSQSpec, MinMaxSpec, PACTSpec, QuantizerSpec, Role, methods

LEARNING: list[tuple[type[QuantizerSpec], Role]] = [
    (methods()[method], role)
    for method in ("lsq", "lsq_plus", "pact", "seq", "lsc")
    for role in methods()[method].roles
]
ACTIVATION_SPECS = [spec for spec in methods().values() if "activation" in spec.roles]


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("gradient", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize(("spec_type", "role"), LEARNING)
def test_no_gradient_makes_a_scale_zero_negative_or_nan(
    spec_type: type[QuantizerSpec], role: Role, gradient: float, lr: float, optimizer_type: type[torch.optim.Optimizer]
) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    spec = spec_type(bits=4, range="minmax")  # type: ignore[call-arg]
    quantizer = weight_quantizer(spec, x) if role == "weight" else activation_quantizer(spec, x)
    parameters = quantizer.train().learned_parameters()
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
        assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("spec_type", ACTIVATION_SPECS)
def test_one_backward_through_several_calls_of_a_step(spec_type: type[QuantizerSpec]) -> None:
    """SAM2 calls a layer once a frame: statistics move between calls whose graphs are still alive."""
    x = torch.randn(4, 8)
    quantizer = activation_quantizer(spec_type(bits=4), x).train()
    inputs = [(x * k).requires_grad_() for k in (1, 2, 3)]
    torch.stack([quantizer(one) for one in inputs]).square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in inputs)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("spec_type", [MinMaxSpec, LSCSpec])
def test_activation_checkpointing_counts_statistics_once(
    spec_type: type[QuantizerSpec], role: Role, use_reentrant: bool
) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    ends = []
    for recompute in (False, True):
        spec = spec_type(bits=4, momentum=0.5)  # type: ignore[call-arg]
        quantizer = weight_quantizer(spec, x) if role == "weight" else activation_quantizer(spec, x)
        quantizer.train()
        calls = [(factor * x).requires_grad_() for factor in (3.0, 0.2)]  # as for two frames
        run = partial(checkpoint, quantizer, use_reentrant=use_reentrant) if recompute else quantizer
        sum(run(y).square().sum() for y in calls).backward()
        ends.append(quantizer.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_quantizer_can_be_compiled_in_one_graph() -> None:
    x = torch.randn(4, 8)
    for quantizer in (weight_quantizer(LSCSpec(bits=4), x).train(), activation_quantizer(LSQSpec(bits=4), x).train()):
        assert torch.equal(torch.compile(quantizer, backend="eager", fullgraph=True)(x), quantizer(x))


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


def test_adam_moves_a_clip_of_small_gradient_if_its_eps_is_smaller() -> None:
    """LSQ's 1/sqrt(N Qp) takes gradients of large activations below Adam's usual eps of 1e-8."""
    x = torch.randn(1, 2**16, generator=torch.Generator().manual_seed(0))
    upstream = 1e-9 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    moved = {}
    for eps in (1e-8, 1e-15):
        quantizer = activation_quantizer(LSQSpec(bits=4), x)
        (parameter,) = quantizer.learned_parameters()
        before = parameter.detach().clone()
        optimizer = torch.optim.AdamW([{"params": [parameter], "eps": eps}], lr=1e-3, weight_decay=0.0)
        quantizer(x).backward(upstream)
        optimizer.step()
        moved[eps] = (parameter - before).abs().item()
    assert moved[1e-8] < 1e-4 and moved[1e-15] == pytest.approx(1e-3, rel=0.01)
