"""Statistics of layer inputs: streamed is one-shot, halves are disjoint, and every message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_calibration import quantize
from torch import Tensor, nn

from qsam2.calibration import gram
from qsam2.calibration.gram import LayerInputs, Moments, gather_inputs, gram_bytes, observe_inputs
from qsam2.models.sam2 import model_config
from qsam2.quantizers import Quantizer


def rows(count: int, size: int = 5, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + mean


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def layers(self) -> dict[str, nn.Linear]:
        return {"first": self.first, "second": self.second}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([0.0, 3.0, 1e4]), st.integers(0, 99))
def test_streamed_is_one_shot(counts: list[int], mean: float, seed: int) -> None:
    x, moments = rows(sum(counts), seed=seed, mean=mean), Moments(5)
    for part in x.split(counts):
        moments.add(part)
    reference = x.double().numpy()
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean.numpy(), reference.mean(0), rtol=1e-12, atol=1e-12)
    covariance, about_zero = (moments.second_moment(centred=centred).numpy() for centred in (True, False))
    np.testing.assert_allclose(covariance, np.cov(reference.T, bias=True), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(about_zero, reference.T @ reference / len(x), rtol=1e-8, atol=1e-12)


def test_small_variance_about_a_large_mean_survives_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of x x^T minus that of the mean would have lost it."""
    monkeypatch.setattr(gram, "CHUNK", 7)
    x = 1e6 + rows(4096).double() * 1e-3
    moments = Moments(5)
    moments.add(x)
    expected = np.cov(x.numpy().T, bias=True)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_each_half_sees_its_samples_and_nothing_else() -> None:
    model, samples = Pair(), [rows(6, seed=index) for index in range(5)]
    samples[1], samples[3] = samples[1].view(2, 3, 5), samples[3].view(1, 2, 3, 5)  # any shape counts as rows
    found = gather_inputs(model.layers(), model, samples, 5)
    fit, held_out = (torch.cat([x.flatten(0, -2) for x in half]) for half in (samples[:2], samples[2:]))
    for half, x in ((found["first"].fit, fit), (found["first"].held_out, held_out)):
        assert half.count == len(x)
        np.testing.assert_allclose(half.covariance.numpy(), np.cov(x.double().numpy().T, bias=True), rtol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(found["second"].fit.mean, model.first(fit).mean(0).double(), rtol=1e-5, atol=1e-6)
    assert not found["first"].fit.noise.any()
    assert not any(layer._forward_pre_hooks for layer in model.layers().values())


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 2, 3]))
def test_two_halves_together_are_one_whole(first: int, second: int, coarse: int) -> None:
    """Each half may be read as it is."""
    halves, whole = [Moments(5), Moments(5)], Moments(5)
    for index, (half, count) in enumerate(zip(halves, (first, second), strict=True)):
        x = rows(count, seed=index, mean=10.0 * index)
        for moments in (half, whole):
            moments.add(x, x.round() if coarse & (1 << index) else None)
    both = halves[0] + halves[1]
    assert both.count == whole.count and (both.cross is both.scatter) == (coarse == 0)
    for name in ("mean", "read_mean", "noise", "scatter", "cross"):
        np.testing.assert_allclose(getattr(both, name).numpy(), getattr(whole, name).numpy(), rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([0.0, 3.0, 1e4]), st.integers(0, 99))
def test_what_is_read_has_moments_of_its_own(counts: list[int], mean: float, seed: int) -> None:
    """Some calls are read as they are, as by a quantizer that is still in float."""
    x, weight = rows(sum(counts), seed=seed, mean=mean), rows(3, seed=1)
    parts = [(part, part.round() if index % 2 else part) for index, part in enumerate(x.split(counts))]
    moments = Moments(5, weight=weight)
    for part, read in parts:
        moments.add(part, read)
    reference, q, w = (each.double().numpy() for each in (x, torch.cat([read for _, read in parts]), weight))
    close = {"rtol": 1e-8, "atol": 1e-8}
    about, q_about = reference - reference.mean(0), q - q.mean(0)
    np.testing.assert_allclose(moments.read_mean.numpy(), q.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance.numpy(), q_about.T @ q_about / len(q), **close)
    np.testing.assert_allclose(moments.second_moment(centred=False).numpy(), q.T @ q / len(q), **close)
    np.testing.assert_allclose(moments.cross_moment(centred=True).numpy(), about.T @ q_about / len(q), **close)
    np.testing.assert_allclose(moments.cross_moment(centred=False).numpy(), reference.T @ q / len(q), **close)
    np.testing.assert_allclose(moments.noise.numpy(), ((q - reference) ** 2).mean(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(moments.outputs, ((about @ w.T) ** 2).sum(), **close)
    np.testing.assert_allclose(moments.losses, (((about - q_about) @ w.T) ** 2).sum(), rtol=1e-6, atol=1e-8)


def test_inputs_are_read_as_the_recipe_says() -> None:
    model, samples = Pair(), [rows(50, seed=index) for index in range(4)]

    def found(**changes: Any) -> tuple[dict[str, Quantizer], dict[str, LayerInputs]]:
        quantizers = observe_inputs(model.layers(), model, samples, 4, quantize(**changes))
        return quantizers, gather_inputs(model.layers(), model, samples, 4, quantizers)

    quantizers, inputs = found(rules=[{"match": "second", "keep_float": True}])
    fit, x = torch.cat(samples[:2]).numpy(), torch.cat(samples[2:]).numpy()
    step = (fit.max() - fit.min()) / 15  # the range of the first half
    zero = np.round(-fit.min() / step)
    for half, moments in ((fit, inputs["first"].fit), (x, inputs["first"].held_out)):
        quantized = (np.clip(np.round(half / step) + zero, 0, 15) - zero) * step
        np.testing.assert_allclose(moments.noise.numpy(), ((quantized - half) ** 2).mean(0), rtol=1e-3)
        np.testing.assert_allclose(moments.covariance.numpy(), np.cov(quantized.T, bias=True), rtol=1e-3, atol=1e-4)
    assert list(quantizers) == ["first"] and not inputs["second"].held_out.noise.any()
    quantizers, _ = found(rules=[{"match": "second", "activation_bits": 8}])
    assert {name: each.bits for name, each in quantizers.items()} == {"first": 4, "second": 8}
    quantizers, inputs = found(activations=None)
    assert not quantizers and all(each.fit.cross is each.fit.scatter for each in inputs.values())


def test_four_float64_matrices_a_layer_of_the_largest_model_fit() -> None:
    trunk = model_config("large").image_encoder.trunk
    sizes: list[int] = []
    for stage, blocks in enumerate(trunk.stages):
        width = trunk.embed_dim * 2**stage
        sizes += blocks * [width, width, width, 4 * width]  # qkv, proj, both of the mlp
    assert max(sizes) == 4608
    total = gram_bytes(nn.Linear(size, 1, device="meta") for size in sizes)
    assert 10e9 < total < 12e9
