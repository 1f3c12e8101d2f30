"""A quantized activation in bytes: its codes, and that kernels read a tensor as it lies in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsam2.quantizers import QuantizerState, build_quantizer
from qsam2.quantizers.fake_quant import Codes, dequantize, fake_quantize
from qsam2.quantizers.passes import SHORTEST_ROW, Layout, to_rows
from qsam2.recipe.quantizer_specs import LSQSpec


def quantized(x: Tensor, spec: LSQSpec, **options: object) -> Tensor:
    quantizer = build_quantizer(spec, "activation", num_channels=x.shape[-1], channel_dim=-1, name="q")
    quantizer.state = QuantizerState.OBSERVE
    quantizer(x.detach())
    quantizer.finish_observing()
    out: Tensor = quantizer(x, **options)
    return out


@settings(max_examples=150)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    order=st.permutations(range(3)),
    seed=st.integers(0, 10**6),
)
def test_codes_are_the_quantized_tensor(
    bits: int, symmetric: bool, granularity: str, dtype: torch.dtype, order: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 4, 5, generator=generator) + 0.3).to(dtype).permute(order)
    spec = LSQSpec(bits=bits, symmetric=symmetric, granularity=granularity)
    out = quantized(x.detach().requires_grad_(), spec, with_codes=True)
    codes = Codes.of(out)
    assert codes is not None and codes.codes.dtype == torch.uint8 and int(codes.codes.max()) < 2**bits
    assert codes.codes.shape == x.shape
    assert torch.equal(dequantize(*codes, out.dtype), out)


def test_codes_are_given_only_where_a_graph_needs_them() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    assert Codes.of(quantized(x, LSQSpec(bits=4))) is None
    with torch.no_grad():
        assert Codes.of(quantized(x, LSQSpec(bits=4), with_codes=True)) is None
    assert Codes.of(x) is None


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_a_permuted_tensor_keeps_its_layout_and_its_gradients(
    order: tuple[int, ...], exact: bool, learned: bool
) -> None:
    dense, grad = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    found = []
    for x, upstream in ((dense, grad), (dense.permute(order), grad.permute(order))):
        leaf, scale = x.detach().requires_grad_(), torch.tensor([0.4], requires_grad=learned)
        out = fake_quantize(leaf, scale, torch.zeros(1), -3, 3, exact_gradient=exact)
        assert out.stride() == x.stride()
        out.backward(upstream)
        found.append((out, leaf.grad, scale.grad if learned else torch.zeros(1)))
    for of_dense, of_permuted in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(of_dense.permute(order), of_permuted)
    torch.testing.assert_close(found[0][2], found[1][2])


def test_a_gradient_of_another_layout_is_read_in_the_tensors_own() -> None:
    x = torch.randn(4, 5).t().requires_grad_()
    scale = torch.tensor([0.4], requires_grad=True)
    grad = torch.randn(5, 4)
    fake_quantize(x, scale, torch.zeros(1), -2, 1, exact_gradient=False).backward(grad)
    inside = (x / 0.4 >= -2) & (x / 0.4 <= 1)
    assert torch.equal(x.grad, grad * inside)


def test_views_copy_nothing_where_there_are_no_gaps() -> None:
    x = torch.randn(2, 3, 4, 5)
    turned = x.permute(0, 2, 1, 3)
    layout = Layout.of(turned, 1, 0)
    assert layout.order == [0, 2, 1, 3] and layout.view == (1, 1, x.numel())
    assert layout.flat(turned).data_ptr() == to_rows(turned, None).data_ptr() == x.data_ptr()
    assert torch.equal(layout.back(layout.flat(turned)), turned)


def test_a_slice_of_a_product_is_read_where_it_lies() -> None:
    """As Hiera's queries, keys and values."""
    qkv = torch.randn(2, 9, 3, 4, 16)
    for part, x in enumerate(qkv.unbind(2)):
        heads = x.transpose(1, 2)
        layout = Layout.of(heads, 1, 0)
        assert layout.view == (18, 1, 64)
        assert layout.flat(heads).data_ptr() == qkv[:, :, part].data_ptr()
        assert torch.equal(layout.back(layout.flat(heads).contiguous()), heads)


def test_short_or_uneven_rows_are_copied() -> None:
    x = torch.randn(4, 6, 40)
    for odd in (x[..., ::2], x[..., : SHORTEST_ROW - 1], x[:, :5, :39], x[:1].expand(4, 6, 40), x[:, :, :1]):
        layout = Layout.of(odd, 1, 0)
        assert layout.view == (1, 1, odd.numel())
        assert torch.equal(layout.back(layout.flat(odd)), odd)


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    last=st.integers(0, 80),
    order=st.permutations(range(4)),
    slices=st.lists(
        st.sampled_from([slice(None), slice(0, 1), slice(1, None), slice(None, None, 2)]), min_size=4, max_size=4
    ),
    expand=st.booleans(),
)
def test_every_layout_comes_back(
    sizes: list[int], last: int, order: list[int], slices: tuple[slice, ...], expand: bool
) -> None:
    x = torch.randn(*sizes, last)[slices].permute(order)
    x = x.unsqueeze(2).expand(-1, -1, 3, -1, -1) if expand else x
    layout = Layout.of(x, 1, 0)
    flat = layout.flat(x)
    assert flat.shape == layout.view and flat.numel() == x.numel()
    assert torch.equal(layout.back(flat.contiguous()), x)


@pytest.mark.parametrize("learned", [True, False])
def test_a_slice_gives_what_its_copy_gives(learned: bool) -> None:
    qkv = torch.randn(2, 7, 3, 2, 32)
    upstream = torch.randn(2, 2, 7, 32)
    found = []
    for x in (qkv[:, :, 1].transpose(1, 2), qkv[:, :, 1].transpose(1, 2).contiguous()):
        leaf, scale = x.detach().requires_grad_(), torch.tensor([0.4], requires_grad=learned)
        out = fake_quantize(leaf, scale, torch.zeros(1), -3, 3, exact_gradient=False)
        out.backward(upstream)
        found.append((out, leaf.grad, scale.grad if learned else torch.zeros(1)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])
