"""Soft rounding and learned steps against their formulas; blocks between soft and hard, which give frozen integers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_calibration import quantize
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.convert import convert, finalize, quantized_weights, quantizers
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantizer_specs import LSQSpec, MinMaxSpec, MSESpec
from qsam2.reconstruction.rounding import (
    LearnedStep,
    SoftRounding,
    beta_at,
    flipped_share,
    harden,
    learn_steps,
    learned_steps,
    soft_roundings,
    soften_weights,
)

SPECS: dict[str, dict[str, Any]] = {
    "minmax a channel": {"method": "minmax", "bits": 4},
    "affine, a tensor": {"method": "minmax", "bits": 3, "symmetric": False, "granularity": "tensor"},
    "mse": {"method": "mse", "bits": 4},
    "lsq at 2 bits, mid-rise": {"method": "lsq", "bits": 2},
    "statsq, mid-rise": {"method": "statsq", "bits": 3},
    "dorefa, tanh": {"method": "dorefa", "bits": 3},
    "lsc": {"method": "lsc", "bits": 4},
}


def rounding(spec: dict[str, Any], channel_dim: int = 0, seed: int = 0) -> tuple[torch.Tensor, SoftRounding]:
    """A weight (8, 6) with a heavy tail, as its frozen quantizer left it, and its soft rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, generator=generator) ** 3
    weights = quantize(weights=spec).weights
    channels = weight.shape[channel_dim]
    quantizer: Quantizer = build_quantizer(weights, "weight", num_channels=channels, channel_dim=channel_dim)
    quantizer.initialize_from(weight)
    quantizer.freeze(weight)
    return weight, SoftRounding(weight, quantizer)


def reference(weight: torch.Tensor, soft: SoftRounding, channel_dim: int) -> np.ndarray:
    """s * clip(floor(W/s) + h(V); low, high), levels half a step off on a mid-rise grid, in float64."""
    quantizer = soft.quantizer
    shape = [1, 1]
    shape[channel_dim] = -1
    scale = quantizer.scale.double().numpy().reshape(shape)
    zero_point = quantizer.zero_point.double().numpy().reshape(shape)
    half = 0.5 if quantizer.grid.mid_rise else 0.0
    h = np.clip(1.2 / (1.0 + np.exp(-soft.v.detach().double().numpy())) - 0.1, 0.0, 1.0)
    steps = (weight.numpy() / scale.astype(np.float32)).astype(np.float64)  # which cell counts at ties: in float32
    levels = np.floor(steps - half) + half + h
    return scale * np.clip(levels, quantizer.qmin - zero_point, quantizer.qmax - zero_point)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("channel_dim", [0, 1])
def test_it_starts_at_the_weight_clipped_and_nearest_and_follows_its_formula(
    spec: dict[str, Any], channel_dim: int
) -> None:
    weight, soft = rounding(spec, channel_dim)
    clipped = torch.clamp(weight, soft.low * soft.scale, soft.high * soft.scale)
    assert torch.allclose(soft(weight), clipped, atol=1e-6 * float(weight.abs().max()))
    assert torch.equal(soft.hard(torch.float32), soft.quantizer(weight)), "untrained, it is nearest rounding"
    nn.init.normal_(soft.v, std=3.0)
    expected = reference(weight, soft, channel_dim)
    np.testing.assert_allclose(soft(weight).detach().numpy(), expected, atol=2e-6 * np.abs(expected).max())


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(sorted(SPECS)), st.sampled_from([0, 1]))
def test_hard_weights_are_their_own_integers_next_to_the_weight(seed: int, name: str, channel_dim: int) -> None:
    weight, soft = rounding(SPECS[name], channel_dim, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        soft.v.copy_(10 * torch.randn(soft.v.shape, generator=generator))
    hard, quantizer = soft.hard(torch.float32), soft.quantizer
    codes = quantizer.to_int(hard)
    assert torch.equal(quantizer.dequantize(codes), hard) and torch.equal(quantizer(hard), hard)
    assert quantizer.qmin <= codes.min() and codes.max() <= quantizer.qmax
    inside = (weight >= soft.low * soft.scale) & (weight <= soft.high * soft.scale)
    assert (((hard - weight).abs() / soft.scale)[inside] < 1 + 1e-4).all()
    assert torch.allclose(hard, soft(weight), atol=1e-5) == bool(((soft.h == 0) | (soft.h == 1)).all())


def test_gradient_reaches_v_by_the_chain_rule() -> None:
    weight, soft = rounding(SPECS["minmax a channel"])
    nn.init.normal_(soft.v)
    coefficients = torch.randn(weight.shape)
    (soft(weight) * coefficients).sum().backward()
    sigmoid = soft.v.detach().sigmoid()
    levels = soft.floor + soft.h.detach()
    free = (soft.h > 0) & (soft.h < 1) & (levels > soft.low) & (levels < soft.high)
    expected = coefficients * soft.scale * 1.2 * sigmoid * (1 - sigmoid) * free
    assert torch.allclose(soft.v.grad, expected, atol=1e-6)


def test_regularization_is_that_of_adaround_a_channel_and_alone_drives_rounding_to_the_nearest() -> None:
    for channel_dim, beta in itertools.product((0, 1), (20.0, 2.0)):
        _, soft = rounding(SPECS["minmax a channel"], channel_dim)
        nn.init.normal_(soft.v)
        h = soft.h.detach().double().numpy()
        expected = (1 - np.abs(2 * h - 1) ** beta).sum() / h.shape[channel_dim]
        assert float(soft.regularization(beta)) == pytest.approx(expected, rel=1e-5)

    weight, soft = rounding(SPECS["minmax a channel"])
    optimizer = torch.optim.Adam([soft.v], lr=0.1)
    for step in range(100):
        optimizer.zero_grad()
        soft.regularization(beta_at(step / 100, 0.0) or 20.0).backward()
        optimizer.step()
    assert ((soft.h == 0) | (soft.h == 1)).float().mean() > 0.95
    assert torch.equal(soft.hard(torch.float32), soft.quantizer(weight))


def test_beta_falls_from_20_to_2_after_warm_up() -> None:
    assert beta_at(0.0, 0.2) is None and beta_at(0.19, 0.2) is None
    assert beta_at(0.2, 0.2) == 20.0 and beta_at(0.6, 0.2) == pytest.approx(11.0)
    assert beta_at(1.0, 0.2) == pytest.approx(2.0) and beta_at(0.0, 0.0) == 20.0


# Steps and blocks


def quantizer(spec: MinMaxSpec | MSESpec | LSQSpec, x: torch.Tensor) -> Quantizer:
    found = build_quantizer(spec, "activation").eval()
    found.state = QuantizerState.OBSERVE
    found(x)
    found.finish_observing()
    return found


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
    convert(found, quantize(weights={"method": "minmax", "bits": 3}))
    find_ranges(found, found, [torch.randn(16, 1, 8)])
    return found


def test_soft_blocks_have_no_rounding_in_their_weights_and_learn_rounding_and_steps_alone(block: nn.Module) -> None:
    weights = [layer.weight.clone() for _, layer, _ in quantized_weights(block)]
    block.requires_grad_(False)
    soften_weights(block)
    learn_steps(block, drop=0.5)
    assert len(soft_roundings(block)) == len(learned_steps(block)) == 2
    assert all(step.drop == 0.5 for step in learned_steps(block))
    for layer, weight in zip((block[0], block[2]), weights, strict=True):
        assert torch.allclose(layer.quantized_weight(), weight, atol=1e-6)
    block(torch.randn(5, 1, 8)).square().sum().backward()
    reached = {name.rpartition(".")[2] for name, p in block.named_parameters() if p.grad is not None}
    assert reached == {"v", "log_scale"}


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
