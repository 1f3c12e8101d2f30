"""The fake-quantization operation against the NumPy reference; its codes, what it saves, and how it reads memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from cases import activation_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Levels
from torch import Tensor

from qsam2.quantizers.fake_quant import Codes, dequantize, fake_quantize
from qsam2.quantizers.passes import SHORTEST_ROW, Layout, to_rows
from qsam2.recipe.quantizer_specs import LSQSpec

EPS = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@settings(max_examples=150)
@given(st.data())
def test_forward_and_backward_agree_with_numpy(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["mid_tread", "mid_rise", "affine"]))
    levels = Levels(data.draw(st.integers(2, 8)), kind != "affine", kind == "mid_rise")
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dim = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
    identity, dtype = data.draw(st.booleans()), data.draw(st.sampled_from(list(EPS)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    channels = 1 if dim is None else shape[dim]
    scale = 0.01 + torch.rand(channels, generator=generator)
    zero_point = torch.full((channels,), -0.5 * levels.mid_rise)
    if kind == "affine":
        zero_point = torch.randint(levels.last + 1, (channels,), generator=generator).float()
    # from well below the first level to well above the last, so that both clips occur
    x = (2**levels.bits * scale.max() * (2 * torch.rand(shape, generator=generator) - 1)).to(dtype)
    if data.draw(st.booleans()):
        x = x.repeat_interleave(2, dim=-1)[..., ::2]  # not contiguous
    before = x.clone()

    def rows(values: Tensor) -> np.ndarray:
        rows = values.reshape(1, -1) if dim is None else values.movedim(dim, 0).reshape(channels, -1)
        return rows.detach().double().numpy()

    def run(x: Tensor, scale: Tensor, zero_point: Tensor, exact: bool) -> Tensor:
        options = {"mid_rise": levels.mid_rise, "identity_gradient": identity, "exact_gradient": exact}
        out = fake_quantize(x, scale, zero_point, levels.first, levels.last, channel_dim=dim or 0, **options)
        assert out.dtype == dtype and out.shape == x.shape and torch.equal(x, before)
        return out

    # an element on a tie or an edge may fall to either side: it takes no part in the gradients
    steps = rows(x) / scale.double().numpy()[:, None]
    unsure = np.abs(np.abs(2 * steps - np.floor(2 * steps) - 0.5) - 0.5) < 2e-4
    upstream = torch.randn(shape, generator=generator).to(dtype)
    aligned = torch.from_numpy(unsure).reshape(x.shape if dim is None else x.movedim(dim, 0).shape)
    upstream[aligned if dim is None else aligned.movedim(0, dim)] = 0.0
    grid = scale.double().numpy(), zero_point.double().numpy(), levels
    expected = reference.quantize(rows(x), *grid)
    gradients = reference.gradients(rows(x), rows(upstream), *grid, samples=1, identity=identity, residual=True)
    size = max(np.abs(gradients.scale).max(), 1.0)
    # one byte per element: at most half of 1/252 of a step is lost of each residual
    lost = upstream.abs().sum().item() / np.sqrt(x.numel() / channels * levels.largest) / 504
    for exact in (True, False):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, scale, zero_point)]
        out = run(*leaves, exact)
        assert torch.equal(out, run(x, scale, zero_point, exact))
        error = np.abs(rows(out) - expected)
        quantum = scale.max().item() * (1 + 1e-6)
        assert (error <= EPS[dtype] * (1 + np.abs(expected)) + quantum * unsure).all()
        out.backward(upstream)
        of_x, of_scale, of_zero_point = (leaf.grad for leaf in leaves)
        np.testing.assert_allclose(rows(of_x), gradients.x, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(of_zero_point.numpy(), gradients.zero_point, rtol=1e-5, atol=1e-5)
        assert (np.abs(of_scale.numpy() - gradients.scale) <= (0 if exact else lost) + 1e-5 * size).all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
@pytest.mark.parametrize("exact", [True, False])
def test_scalars_and_empty_tensors(shape: tuple[int, ...], exact: bool) -> None:
    x, scale = torch.full(shape, 0.3, requires_grad=True), torch.tensor([0.25], requires_grad=True)
    out = fake_quantize(x, scale, torch.zeros(1), -8, 7, exact_gradient=exact)
    out.sum().backward()
    assert torch.equal(out, torch.full(shape, 0.25))


def test_nan_is_not_hidden() -> None:
    x = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")])
    out = fake_quantize(x, torch.tensor([0.5]), torch.zeros(1), -8, 7)
    assert out[0].isnan() and out[1:].tolist() == [1.0, 3.5, -4.0]


@pytest.mark.parametrize(
    ("exact", "learned", "identity", "bytes_per_element"),
    [(False, True, False, 1), (False, False, False, 1), (False, False, True, 0), (True, True, False, 4)],
)
def test_what_is_saved_for_the_backward_pass(
    exact: bool, learned: bool, identity: bool, bytes_per_element: int
) -> None:
    x, scale, saved = torch.randn(64, 64, requires_grad=True), torch.full((1,), 0.1, requires_grad=learned), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize(x, scale, torch.zeros(1), -8, 7, exact_gradient=exact, identity_gradient=identity)
    assert sum(tensor.nbytes for tensor in saved) <= bytes_per_element * x.numel() + 64
    if exact:  # a weight is in memory anyway
        assert [t.data_ptr() for t in saved if t.numel() == x.numel()] == [x.data_ptr()]


# Codes


@settings(max_examples=150)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel"]),
    dtype=st.sampled_from(list(EPS)),
    order=st.permutations(range(3)),
    seed=st.integers(0, 10**6),
)
def test_codes_are_the_quantized_tensor(
    bits: int, symmetric: bool, granularity: str, dtype: torch.dtype, order: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 4, 5, generator=generator) + 0.3).to(dtype).permute(order)
    spec = LSQSpec(bits=bits, symmetric=symmetric, granularity=granularity)
    quantizer = activation_quantizer(spec, x, num_channels=x.shape[-1], channel_dim=-1)
    out = quantizer(x.detach().requires_grad_(), with_codes=True)
    codes = Codes.of(out)
    assert codes is not None and codes.codes.dtype == torch.uint8 and int(codes.codes.max()) < 2**bits
    assert codes.codes.shape == x.shape and torch.equal(dequantize(*codes, out.dtype), out)


def test_codes_are_given_only_where_a_graph_needs_them() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    quantizer = activation_quantizer(LSQSpec(bits=4), x.detach())
    with torch.no_grad():
        assert Codes.of(quantizer(x, with_codes=True)) is None
    assert Codes.of(quantizer(x)) is None and Codes.of(x) is None


# Layouts


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows, columns": lambda x: x.permute(0, 1, 2, 4, 3),
    "turned": lambda x: x.permute(2, 0, 1, 4, 3),
    "of heads": lambda x: x.transpose(1, 2),
    "a slice of a product": lambda x: x[:, :, 1].transpose(1, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_a_view_gives_what_its_copy_gives(view: Callable[[Tensor], Tensor], exact: bool, learned: bool) -> None:
    x = view(torch.randn(2, 7, 3, 2, 32))
    for upstream in (torch.randn(x.shape), view(torch.randn(2, 7, 3, 2, 32))):  # laid out as the copy and as the view
        found = []
        for leaf in (x.detach().requires_grad_(), x.contiguous().requires_grad_()):
            scale = torch.tensor([0.4], requires_grad=learned)
            out = fake_quantize(leaf, scale, torch.zeros(1), -3, 3, exact_gradient=exact)
            out.backward(upstream)
            assert out.stride() == leaf.stride() or x.numel() < 2 * 7 * 3 * 2 * 32
            found.append((out, leaf.grad, scale.grad if learned else torch.zeros(1)))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        torch.testing.assert_close(found[0][2], found[1][2])


def test_a_tensor_is_read_where_it_lies_if_its_rows_are_long_and_even() -> None:
    x = torch.randn(2, 9, 3, 4, 16)
    turned = x.permute(0, 2, 1, 4, 3)
    assert to_rows(turned, None).data_ptr() == x.data_ptr()
    heads = [part.transpose(1, 2) for part in x.unbind(2)]  # as Hiera's queries, keys and values
    rows = torch.randn(4, 6, 40)
    odd = (rows[..., ::2], rows[..., : SHORTEST_ROW - 1], rows[:, :5, :39], rows[:1].expand(4, 6, 40), rows[:, :, :1])
    for view, shape in ((turned, (1, 1, x.numel())), *((h, (18, 1, 64)) for h in heads), *((o, None) for o in odd)):
        layout = Layout.of(view, 1, 0)
        flat = layout.flat(view)
        assert layout.view == (shape or (1, 1, view.numel()))
        assert shape is None or flat.data_ptr() == view.data_ptr()
        assert torch.equal(layout.back(flat.contiguous()), view)


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
    sizes: list[int], last: int, order: list[int], slices: list[slice], expand: bool
) -> None:
    x = torch.randn(*sizes, last)[tuple(slices)].permute(order)
    x = x.unsqueeze(2).expand(-1, -1, 3, -1, -1) if expand else x
    layout = Layout.of(x, 1, 0)
    flat = layout.flat(x)
    assert flat.shape == layout.view and flat.numel() == x.numel()
    assert torch.equal(layout.back(flat.contiguous()), x)
