"""Attention over the memory itself, projected afterwards: the same sums, in another order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam2.layers import attention as module
from qsam2.layers.attention import attend, projects_values_last
from qsam2.layers.convert import convert
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 12)),
    block=st.integers(1, 9),
    raised=st.booleans(),
)
def test_narrow_values_agree_with_torch(seed: int, shape: tuple[int, int, int, int], block: int, raised: bool) -> None:
    batch, heads, queries, keys = shape
    torch.manual_seed(seed)
    q, k = torch.randn(batch, heads, queries, 16), torch.randn(batch, heads, keys, 16)
    v = torch.randn(batch, heads, keys, 4)
    mask = torch.randn(batch, 1, 1, keys) if raised else None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "QUERIES", block)
        patch.setattr(module, "ROW", 4)
        out = attend(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


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
