"""Soft rounding against its formulas in NumPy, and that what comes out of it are frozen integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qsam2.quantizers import Quantizer, build_quantizer
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.reconstruction.rounding import SoftRounding, beta_at

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
    weights = QuantizeRecipe.model_validate({"weights": spec}).weights
    assert weights is not None
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


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(sorted(SPECS)), st.sampled_from([0, 1]))
def test_hard_weights_are_their_own_integers_next_to_the_weight(seed: int, name: str, channel_dim: int) -> None:
    weight, soft = rounding(SPECS[name], channel_dim, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        soft.v.copy_(10 * torch.randn(soft.v.shape, generator=generator))
    hard, quantizer = soft.hard(torch.float32), soft.quantizer
    codes = quantizer.to_int(hard)
    assert torch.equal(quantizer.dequantize(codes), hard)
    assert torch.equal(quantizer(hard), hard)
    assert quantizer.qmin <= codes.min() and codes.max() <= quantizer.qmax
    inside = (weight >= soft.low * soft.scale) & (weight <= soft.high * soft.scale)
    steps = ((hard - weight).abs() / soft.scale)[inside]
    assert (steps < 1 + 1e-4).all()
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


@pytest.mark.parametrize("channel_dim", [0, 1])
def test_regularization_is_that_of_adaround_a_channel(channel_dim: int) -> None:
    _, soft = rounding(SPECS["minmax a channel"], channel_dim)
    nn.init.normal_(soft.v)
    h = soft.h.detach().double().numpy()
    for beta in (20.0, 2.0):
        expected = (1 - np.abs(2 * h - 1) ** beta).sum() / h.shape[channel_dim]
        assert float(soft.regularization(beta)) == pytest.approx(expected, rel=1e-5)


def test_regularization_alone_drives_rounding_to_the_nearest() -> None:
    weight, soft = rounding(SPECS["minmax a channel"])
    nearest = soft.quantizer(weight)
    optimizer = torch.optim.Adam([soft.v], lr=0.1)
    for step in range(100):
        optimizer.zero_grad()
        soft.regularization(beta_at(step / 100, 0.0) or 20.0).backward()
        optimizer.step()
    assert ((soft.h == 0) | (soft.h == 1)).float().mean() > 0.95
    assert torch.equal(soft.hard(torch.float32), nearest)


def test_beta_falls_from_20_to_2_after_warm_up() -> None:
    assert beta_at(0.0, 0.2) is None and beta_at(0.19, 0.2) is None
    assert beta_at(0.2, 0.2) == 20.0 and beta_at(0.6, 0.2) == pytest.approx(11.0)
    assert beta_at(1.0, 0.2) == pytest.approx(2.0) and beta_at(0.0, 0.0) == 20.0
