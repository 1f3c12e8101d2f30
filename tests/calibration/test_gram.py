"""Statistics of layer inputs: streamed is one-shot, halves are disjoint, and every message."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_calibration import quantize
from torch import Tensor, nn

from qsam2.calibration import gram
from qsam2.calibration.gram import Moments, gather_inputs, gram_bytes
from qsam2.models.sam2 import model_config


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
    assert not found["first"].noise.any()
    assert not any(layer._forward_pre_hooks for layer in model.layers().values())


def test_noise_is_what_inputs_lose_that_are_quantized_as_the_recipe_says() -> None:
    model, samples = Pair(), [rows(50, seed=index) for index in range(4)]
    found = gather_inputs(model.layers(), model, samples, 4, quantize(rules=[{"match": "second", "keep_float": True}]))
    fit, x = torch.cat(samples[:2]).numpy(), torch.cat(samples[2:]).numpy()
    step = (fit.max() - fit.min()) / 15
    zero = np.round(-fit.min() / step)
    quantized = (np.clip(np.round(x / step) + zero, 0, 15) - zero) * step
    np.testing.assert_allclose(found["first"].noise.numpy(), ((quantized - x) ** 2).mean(0), rtol=1e-3)
    assert found["second"].quantizer is None and not found["second"].noise.any()
    found = gather_inputs(
        model.layers(), model, samples, 4, quantize(rules=[{"match": "second", "activation_bits": 8}])
    )
    assert {name: each.quantizer.bits for name, each in found.items()} == {"first": 4, "second": 8}
    found = gather_inputs(model.layers(), model, samples, 4, quantize(activations=None))
    assert [each.quantizer for each in found.values()] == [None, None]


def test_two_float64_matrices_a_layer_of_the_largest_model_fit() -> None:
    trunk = model_config("large").image_encoder.trunk
    sizes: list[int] = []
    for stage, blocks in enumerate(trunk.stages):
        width = trunk.embed_dim * 2**stage
        sizes += blocks * [width, width, width, 4 * width]  # qkv, proj, both of the mlp
    assert max(sizes) == 4608
    total = gram_bytes(nn.Linear(size, 1, device="meta") for size in sizes)
    assert 5e9 < total < 6e9
