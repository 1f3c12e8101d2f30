"""`attend` against softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam2.layers.attention import attend


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.double() for part in (q, k, v))
    return torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q, k) / q.shape[-1] ** 0.5, dim=-1) @ v


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), queries=st.integers(1, 70), keys=st.integers(1, 70),
    channels=st.sampled_from([8, 24, 32]), low=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_windows(batch: int, heads: int, queries: int, keys: int, channels: int, low: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype, tolerance = (torch.bfloat16, 3e-2) if low else (torch.float32, 1e-5)
    q = torch.randn(batch, heads, queries, channels, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, heads, keys, channels, generator=generator).to(dtype)
    out = attend(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(q, k, v), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 1500])
def test_many_keys_are_read_in_rows(queries: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 2, queries, 16).bfloat16()
    k, v = torch.randn(2, 2, 2, 1030, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v).double(), reference(q, k, v), rtol=3e-2, atol=1e-2)
