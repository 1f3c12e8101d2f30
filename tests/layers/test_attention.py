"""The quantized attentions, with quantizers left out, against SAM2's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sam2.modeling.backbones.hieradet import MultiScaleAttention
from sam2.modeling.position_encoding import apply_rotary_enc, compute_axial_cis
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import nn

from qsam2.layers.attention import (
    QuantAttention,
    QuantMultiScaleAttention,
    QuantRoPEAttention,
    axial_rotary_table,
    rotary_table,
    rotate,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
HEADS = st.integers(1, 2)


class Rounding(nn.Module):
    """Stands for an activation quantizer: rounds to tenths and remembers what it saw."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return (10 * x).round() / 10


def rope(*quantizers: Any, num_heads: int = 2, **options: Any) -> tuple[RoPEAttention, QuantRoPEAttention]:
    """SAM2's rotary attention and ours with the same weights."""
    original = RoPEAttention(embedding_dim=16, num_heads=num_heads, **{"feat_sizes": (4, 4), **options})
    return original, QuantRoPEAttention.from_float(copy.deepcopy(original), *quantizers)


@given(
    batch=st.integers(1, 2),
    heads=HEADS,
    width=st.integers(1, 4),
    height=st.integers(1, 4),
    repeats=st.integers(1, 3),
    quarter=st.integers(1, 4),
    theta=st.sampled_from([100.0, 10000.0]),
)
@settings(max_examples=40)
def test_rotation_is_the_complex_product(batch, heads, width, height, repeats, quarter, theta):
    dim, tokens = 4 * quarter, width * height
    q, k = torch.randn(batch, heads, tokens, dim), torch.randn(batch, heads, repeats * tokens, dim)
    complex_table = compute_axial_cis(dim, width, height, theta)
    expected_q, expected_k = apply_rotary_enc(q, k, complex_table, repeat_freqs_k=repeats > 1)
    table = axial_rotary_table(dim, width, height, theta)
    torch.testing.assert_close(rotate(q, *table), expected_q, **CLOSE)
    torch.testing.assert_close(rotate(k, *table), expected_k, **CLOSE)
    torch.testing.assert_close(rotate(q, *table).norm(dim=-1), q.norm(dim=-1), **CLOSE)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2, 2)])
@pytest.mark.parametrize("rate", [1, 2])
def test_attentions_without_positions_agree_with_sam2(heads, pool, rate):
    original, x = MultiScaleAttention(16, 16 * rate, heads, q_pool=pool), torch.randn(2, 6, 8, 16)
    torch.testing.assert_close(QuantMultiScaleAttention.from_float(original)(x), original(x), **CLOSE)
    channels = 32 if pool is None else 8
    original = Attention(32, heads, rate, kv_in_dim=channels)
    q, (k, v) = torch.randn(2, 5, 32), torch.randn(2, 2, 7, channels)
    torch.testing.assert_close(QuantAttention.from_float(original)(q, k, v), original(q, k, v), **CLOSE)


@given(
    heads=HEADS,
    channels=st.sampled_from([16, 8]),
    downsample_rate=st.integers(1, 2),
    feat_sizes=st.sampled_from([(4, 4), (8, 2)]),
    repeat=st.booleans(),
    side=st.integers(3, 6),
    frames=st.integers(0, 3),
    pointers=st.sampled_from([0, 4]),
)
@settings(max_examples=80)
def test_rope_attention_agrees_with_sam2(heads, channels, downsample_rate, feat_sizes, repeat, side, frames, pointers):
    if not repeat:  # self-attention
        frames, pointers = 1, 0
    assume(frames + pointers > 0)
    sizes = {"kv_in_dim": channels, "downsample_rate": downsample_rate, "feat_sizes": feat_sizes}
    original, converted = rope(num_heads=heads, rope_k_repeat=repeat, rope_theta=100.0, **sizes)
    q = torch.randn(2, side * side, 16)
    k, v = torch.randn(2, 2, frames * side * side + pointers, channels)
    expected = original(q, k, v, num_k_exclude_rope=pointers)
    torch.testing.assert_close(converted(q, k, v, num_k_exclude_rope=pointers), expected, **CLOSE)


def test_rope_attention_agrees_in_bfloat16_autocast():
    (original, converted), x = rope(), torch.randn(2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(converted(x, x, x), original(x, x, x))


def test_gradients_agree_with_sam2():
    original, converted = rope(rope_k_repeat=True)
    q, k = torch.randn(1, 16, 16), torch.randn(1, 36, 16)
    for module in (original, converted):
        module(q, k, k, num_k_exclude_rope=4).square().sum().backward()
    for (name, ours), theirs in zip(converted.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("cls, twin", [(Attention, QuantAttention), (RoPEAttention, QuantRoPEAttention)])
def test_dropout_acts_in_training_only(cls, twin):
    original, x = cls(embedding_dim=16, num_heads=2, dropout=0.5), torch.randn(2, 16, 16)
    converted, outputs = twin.from_float(copy.deepcopy(original)), []
    for module in (original, converted):
        torch.manual_seed(0)
        outputs.append(module.train()(x, x, x))
    torch.testing.assert_close(*outputs, **CLOSE)
    assert not torch.allclose(outputs[1], converted(x, x, x)), "training draws a new mask each time"
    assert torch.equal(converted.eval()(x, x, x), converted(x, x, x))


@pytest.mark.parametrize("excluded", [0, 2])
def test_q_k_v_are_quantized_after_rotary_encoding(excluded):
    quantizers = Rounding(), Rounding(), Rounding()
    _, converted = rope(*quantizers, rope_k_repeat=True)
    x, memory = torch.randn(1, 16, 16), torch.randn(1, 32 + excluded, 16)
    converted(x, memory, memory, num_k_exclude_rope=excluded)
    assert [tuple(quantizer.seen.shape) for quantizer in quantizers] == [(1, 2, 16, 8)] + 2 * [(1, 2, 32 + excluded, 8)]
    heads, seen = converted._separate_heads(converted.k_proj(memory), 2), quantizers[1].seen
    assert torch.equal(seen[:, :, 32:], heads[:, :, 32:]), "object pointers are not rotated"
    torch.testing.assert_close(seen[:, :, 16:32], rotate(heads[:, :, 16:32], *rotary_table(converted, 16)))


@pytest.mark.parametrize("which", range(3))
def test_each_quantizer_changes_the_output(which):
    original, x = MultiScaleAttention(16, 16, 2), torch.randn(1, 4, 4, 16)
    quantizers = [Rounding() if index == which else None for index in range(3)]
    assert not torch.equal(QuantMultiScaleAttention.from_float(original, *quantizers)(x), original(x))


def test_it_stands_for_sam2s_class_and_writes_to_no_input_or_table():
    original, converted = rope(num_heads=1)
    assert converted.state_dict().keys() == original.state_dict().keys()
    assert isinstance(converted, RoPEAttention), "MemoryAttentionLayer asks for this class"
    converted.k_proj = nn.Identity()
    x, table = torch.randn(1, 9, 16), converted.rotary_cos
    before = x.clone()
    with torch.no_grad():
        converted(x, x, x)
    assert torch.equal(x, before) and converted.rotary_cos is table


def test_token_counts_that_do_not_fit_are_refused():
    (_, converted), x = rope(), torch.randn(1, 32, 16)
    with pytest.raises(ValueError, match="15 query tokens: give 16 or a square number"):
        converted(x[:, :15], x[:, :15], x[:, :15])
    with pytest.raises(ValueError, match="32 keys to rotate, rope_k_repeat=False"):
        converted(x[:, :16], x, x)


def test_rope_attention_exports_without_complex_numbers():
    (_, converted), x = rope(), torch.randn(1, 16, 16)
    exported = torch.export.export(converted.eval(), (x, x, x))
    assert "complex" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x, x, x), converted(x, x, x), **CLOSE)
