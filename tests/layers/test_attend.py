"""Attention for inference: softmax attention, by torch or by scores of its own; values projected before or after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsam2.layers import attention as module
from qsam2.layers.attention import attend, projects_values_last
from qsam2.layers.convert import convert
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec


@settings(max_examples=50)
@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    channels=st.sampled_from([(8, 8), (24, 24), (32, 32), (16, 4)]),
    block=st.sampled_from([1, 3, 9, 1024]),
    low=st.booleans(),
    biased=st.booleans(),
)
@example(seed=0, shape=(2, 2, 1500, 1030), channels=(16, 16), block=1024, low=True, biased=False)
@example(seed=0, shape=(2, 2, 1, 1030), channels=(16, 16), block=1024, low=True, biased=False)
def test_it_is_softmax_attention(seed, shape, channels, block, low, biased):
    (batch, heads, queries, keys), generator = shape, torch.Generator().manual_seed(seed)
    dtype, tolerance = (torch.bfloat16, 3e-2) if low else (torch.float32, 1e-5)
    sizes = [(heads, queries, channels[0]), (heads, keys, channels[0]), (heads, keys, channels[1]), (1, 1, keys)]
    q, k, v, bias = (torch.randn(batch, *size, generator=generator).to(dtype) for size in sizes)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "QUERIES", block)
        patch.setattr(module, "ROW", 4)
        out = attend(q, k, v, bias if biased else None)
    assert out.dtype == dtype
    scores = q.double() @ k.double().transpose(2, 3) / channels[0] ** 0.5 + (bias.double() if biased else 0.0)
    torch.testing.assert_close(out.double(), scores.softmax(dim=-1) @ v.double(), rtol=tolerance, atol=tolerance)


def test_projecting_afterwards_is_the_same() -> None:
    q, k, memory = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 4)
    project = torch.nn.Linear(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(project(attend(q, k, memory)), attend(q, k, project(memory)))


def test_bfloat16_stays_near_float32() -> None:
    """Scores are rounded once more than by torch's fused attention: within three times its error."""
    q, k, v = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 256, 64), torch.randn(1, 1, 256, 64)
    expected, half = F.scaled_dot_product_attention(q, k, v), [x.bfloat16() for x in (q, k, v)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = attend(*half)
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).norm() < 3 * (F.scaled_dot_product_attention(*half) - expected).norm()


def test_gradients_and_dropout_take_torchs_way() -> None:
    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    assert attend(q, q, q[..., :4]).requires_grad
    with torch.no_grad():
        assert not torch.equal(attend(q, q, q[..., :4], dropout_p=0.5), attend(q, q, q[..., :4]))


def test_values_are_projected_last_unless_the_model_learns_or_quantizes_them(model: SAM2) -> None:
    assert not projects_values_last(model.memory_attention.layers[0].cross_attn_image)
    with torch.no_grad():
        assert projects_values_last(model.memory_attention.layers[0].cross_attn_image)
        convert(model, QuantizeRecipe(weights=MinMaxSpec(bits=8), activations=MinMaxSpec(bits=8)))
        assert not projects_values_last(model.memory_attention.layers[0].cross_attn_image)
