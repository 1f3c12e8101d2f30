"""Attention for inference: softmax attention, by torch or by scores of its own; values projected before or after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsam2.layers import attention as module
from qsam2.layers.attention import attend, projects_values_last
from qsam2.layers.convert import convert
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention in float64."""
    q, k, v = (part.double() for part in (q, k, v))
    return torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q, k) / q.shape[-1] ** 0.5 + bias, dim=-1) @ v


@settings(max_examples=50)
@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    channels=st.sampled_from([(8, 8), (24, 24), (32, 32), (16, 4)]),
    block=st.sampled_from([1, 3, 9, 1024]),
    low=st.booleans(),
    biased=st.booleans(),
)
def test_it_is_softmax_attention(seed, shape, channels, block, low, biased):
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(seed)
    dtype, tolerance = (torch.bfloat16, 3e-2) if low else (torch.float32, 1e-5)
    q = torch.randn(batch, heads, queries, channels[0], generator=generator).to(dtype)
    k = torch.randn(batch, heads, keys, channels[0], generator=generator).to(dtype)
    v = torch.randn(batch, heads, keys, channels[1], generator=generator).to(dtype)
    bias = torch.randn(batch, 1, 1, keys, generator=generator).to(dtype) if biased else None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "QUERIES", block)
        patch.setattr(module, "ROW", 4)
        out = attend(q, k, v, bias)
    assert out.dtype == dtype
    expected = reference(q, k, v, 0.0 if bias is None else bias)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 1500])
def test_many_keys_are_read_in_rows(queries: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 2, queries, 16).bfloat16()
    k, v = torch.randn(2, 2, 2, 1030, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v).double(), reference(q, k, v), rtol=3e-2, atol=1e-2)


def test_projecting_afterwards_is_the_same() -> None:
    torch.manual_seed(0)
    q, k, memory = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 4)
    project = torch.nn.Linear(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(project(attend(q, k, memory)), attend(q, k, project(memory)))


def test_bfloat16_stays_near_float32() -> None:
    """Scores are rounded once more than by torch's fused attention: within three times its error."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 256, 64), torch.randn(1, 1, 256, 64)
    expected = F.scaled_dot_product_attention(q, k, v)
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = attend(*half)
    assert ours.dtype == torch.bfloat16
    error = (ours - expected).norm() / (F.scaled_dot_product_attention(*half) - expected).norm()
    assert error < 3


def test_gradients_and_dropout_take_torchs_way() -> None:
    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    assert attend(q, q, q[..., :4]).requires_grad
    with torch.no_grad():
        assert not torch.equal(attend(q, q, q[..., :4], dropout_p=0.5), attend(q, q, q[..., :4]))


def test_who_reads_the_memory_itself(model: SAM2) -> None:
    """Not a model that learns, nor one whose values are quantized."""
    attention = model.memory_attention.layers[0].cross_attn_image
    assert not projects_values_last(attention)
    with torch.no_grad():
        assert projects_values_last(attention)
        spec = MinMaxSpec(bits=8)
        convert(model, QuantizeRecipe(weights=spec, activations=spec))
        assert not projects_values_last(model.memory_attention.layers[0].cross_attn_image)
