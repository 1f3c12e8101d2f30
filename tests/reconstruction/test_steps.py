"""Learned steps and dropped quantization of activations; blocks between soft and hard."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.convert import convert, finalize, quantized_weights, quantizers
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import LSQSpec, MinMaxSpec, MSESpec
from qsam2.reconstruction.rounding import (
    LearnedStep,
    flipped_share,
    harden,
    learn_steps,
    learned_steps,
    soft_roundings,
    soften_weights,
)


def quantizer(spec: MinMaxSpec | MSESpec | LSQSpec, x: torch.Tensor) -> Quantizer:
    found = build_quantizer(spec, "activation").eval()
    found.state = QuantizerState.OBSERVE
    found(x)
    found.finish_observing()
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_any_quantizer_learns_its_step_as_lsq_does(symmetric: bool) -> None:
    x = torch.randn(3, 50, 8) + 0.3
    lsq = quantizer(LSQSpec(bits=4, symmetric=symmetric), x)
    static = quantizer(MSESpec(bits=4, symmetric=symmetric), x)
    static.freeze()
    step = LearnedStep(static)
    coefficients = torch.randn_like(x)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [lsq(inputs[0]), step(inputs[1])]
    assert torch.allclose(*outputs, atol=1e-6)
    for output in outputs:
        (output * coefficients).sum().backward()
    assert torch.allclose(lsq.log_scale.grad, step.log_scale.grad, rtol=1e-4)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_drop_leaves_its_share_in_float() -> None:
    x = torch.randn(20000)
    static = quantizer(MinMaxSpec(bits=2), x)
    static.freeze()
    dropped, quantized = LearnedStep(static, drop=0.5)(x).detach(), static(x)
    kept = dropped == x
    torch.testing.assert_close(dropped[~kept], quantized[~kept])  # the step is exp(log(scale))
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(LearnedStep(static, drop=0.5)(x), LearnedStep(static, drop=0.5)(x))


@pytest.fixture
def block() -> nn.Module:
    found = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    recipe = {"weights": {"method": "minmax", "bits": 3}, "activations": {"method": "minmax", "bits": 4}}
    convert(found, QuantizeRecipe.model_validate(recipe))
    x = torch.randn(16, 1, 8)
    find_ranges(found, found, [x])
    return found


def test_soft_blocks_have_no_rounding_in_their_weights(block: nn.Module) -> None:
    weights = {name: layer.weight.clone() for name, layer, _ in quantized_weights(block)}
    soften_weights(block)
    learn_steps(block, drop=0.5)
    assert len(soft_roundings(block)) == len(learned_steps(block)) == 2
    assert all(step.drop == 0.5 for step in learned_steps(block))
    for name, layer in block.named_modules():
        if name in weights:
            assert torch.allclose(layer.quantized_weight(), weights[name], atol=1e-6)


@pytest.mark.parametrize("with_steps", [False, True])
def test_hardening_an_untrained_block_gives_what_finalizing_gives(block: nn.Module, with_steps: bool) -> None:
    finalized, x = copy.deepcopy(block), torch.randn(5, 1, 8)
    finalize(finalized)
    soften_weights(block)
    if with_steps:
        learn_steps(block)
    assert flipped_share(block) == 0.0
    harden(block)
    assert not soft_roundings(block) and not learned_steps(block)
    weight_states = {q.state for _, _, q in quantized_weights(block)}
    assert weight_states == {QuantizerState.FROZEN}
    assert torch.allclose(block(x), finalized(x), atol=1e-6)
    finalize(block)
    for (_, ours, _), (_, theirs, _) in zip(quantized_weights(block), quantized_weights(finalized), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert {q.state for _, q in quantizers(block)} == {QuantizerState.FROZEN}


def test_finalizing_keeps_what_was_learned(block: nn.Module) -> None:
    soften_weights(block)
    learn_steps(block)
    with torch.no_grad():
        for soft in soft_roundings(block):
            soft.v.copy_(torch.where(torch.rand_like(soft.v) < 0.5, -5.0, 5.0))
        for step in learned_steps(block):
            step.log_scale.add_(0.1)
    x, share = torch.randn(5, 1, 8), flipped_share(block)
    soft_output = block(x)
    harden(block)
    assert 0.3 < share < 0.7
    assert torch.allclose(block(x), soft_output, atol=1e-5)
    weights = [layer.weight.clone() for _, layer, _ in quantized_weights(block)]
    finalize(block)
    assert all(torch.equal(a, layer.weight) for a, (_, layer, _) in zip(weights, quantized_weights(block), strict=True))
    assert torch.allclose(block(x), soft_output, atol=1e-5)


def test_gradients_flow_to_rounding_and_steps_alone(block: nn.Module) -> None:
    block.requires_grad_(False)
    soften_weights(block)
    learn_steps(block)
    block(torch.randn(5, 1, 8)).square().sum().backward()
    reached = {name.rpartition(".")[2] for name, p in block.named_parameters() if p.grad is not None}
    assert reached == {"v", "log_scale"}
