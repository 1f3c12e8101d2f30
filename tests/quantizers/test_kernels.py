"""Compiled and blocked kernels of the operation against the eager ones, and the choice between them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsam2.quantizers import fake_quant, kernels, native, passes
from qsam2.quantizers.fake_quant import EAGER, Codes, Kernels, dequantize, fake_quantize, use_kernels
from qsam2.quantizers.kernels import choose_kernels, compiled_kernels
from qsam2.quantizers.native import native_kernels
from qsam2.quantizers.observers import sums
from qsam2.quantizers.passes import Layout

pytestmark = pytest.mark.slow  # compiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager_again() -> Iterator[None]:
    yield
    use_kernels(EAGER)
    choose_kernels.cache_clear()


@pytest.fixture(scope="module", params=["native", "torch.compile"])
def compiled(request: pytest.FixtureRequest) -> Kernels:
    try:
        if request.param == "native":
            return native_kernels()
        kernels = compiled_kernels()._replace(min_elements=2)
        run(kernels, torch.ones(8), torch.ones(1))
    except (RuntimeError, ImportError, OSError) as error:
        pytest.skip(f"{request.param} finds no working compiler: {str(error).splitlines()[0]}")
    return kernels


def run(kernels: Kernels, x: Tensor, scale: Tensor, *, learned: bool = True, **options: bool) -> list[Tensor]:
    """Output, and gradients of x, scale and zero point where there are any; the upstream gradient is x, mirrored."""
    use_kernels(kernels)
    x = x.clone().requires_grad_()
    scale = scale.clone().requires_grad_(learned)
    mid_rise = options.get("mid_rise", False)
    zero_point = torch.full_like(scale, -0.5 if mid_rise else 1.0).requires_grad_(learned)
    out = fake_quantize(x, scale, zero_point, -2 if mid_rise else -8, 1 if mid_rise else 7, **options)
    out.backward(x.detach().flip(0))
    return [out.detach(), *(tensor.grad for tensor in (x, scale, zero_point) if tensor.grad is not None)]


def agree(actual: list[Tensor], expected: list[Tensor], x: Tensor, scale: Tensor) -> None:
    """Away from ties and edges bit for bit, at them to one quantum; sums to the order of their terms."""
    assert len(actual) == len(expected)
    steps = x.float() / scale.view(-1, *[1] * (x.ndim - 1))
    unsure = ((2 * steps).frac().abs() - 0.5).abs() > 0.5 - 1e-5  # ties and edges are multiples of half a step
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours[~unsure], theirs[~unsure])
    quantum = scale.view(-1, *[1] * (x.ndim - 1)) * 1.01
    assert ((actual[0].float() - expected[0].float()).abs() <= quantum).all()
    if not unsure.any():
        for ours, theirs in zip(actual[2:], expected[2:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


COMBINATIONS: list[Any] = [  # each is compiled on its own, which takes seconds
    (torch.float32, True, {}),
    (torch.bfloat16, False, {"exact_gradient": False}),
    (torch.float32, False, {"exact_gradient": False, "mid_rise": True, "identity_gradient": True}),
    *(
        pytest.param(*combination, marks=pytest.mark.prove)
        for combination in (
            (torch.float16, True, {"exact_gradient": False, "mid_rise": True, "residual_gradient": False}),
            (torch.float16, False, {"exact_gradient": False, "learned": False}),
            (torch.float32, True, {"learned": False}),
        )
    ),
]


@pytest.mark.parametrize(("dtype", "per_channel", "options"), COMBINATIONS)
def test_compiled_agrees_with_eager(
    compiled: Kernels, dtype: torch.dtype, per_channel: bool, options: dict[str, bool]
) -> None:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(2, 6), st.integers(7, 300), st.integers(0, 2**32))
    def check(channels: int, inner: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = 0.01 + torch.rand(channels if per_channel else 1, generator=generator)
        x = (6 * scale.max() * torch.randn(channels, inner, generator=generator)).to(dtype)
        found = [run(kernels, x, scale, **options) for kernels in (compiled, EAGER)]
        agree(*found, x, scale)

    check()


def test_compiled_rounds_half_to_even_and_keeps_nan_and_shape(compiled: Kernels) -> None:
    x = (torch.arange(-16, 17) / 2.0).view(3, 1, 11).expand(3, 4, 11).transpose(0, 2)
    x = x.clone(memory_format=torch.preserve_format)
    x[0, 0, 0] = math.nan
    out = run(compiled, x, torch.ones(1))[0]
    torch.testing.assert_close(out, x.round().clamp(-9, 6), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compiled", ["torch.compile"], indirect=True)
def test_sizes_and_ranks_are_dynamic(compiled: Kernels) -> None:
    torch._dynamo.reset()
    run(compiled, torch.randn(3, 50), torch.rand(3) + 0.1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    for shape in ((4, 60), (7, 33), (50, 8, 5)):
        run(compiled, torch.randn(shape), torch.rand(shape[0]) + 0.1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("mid_rise", [False, True])
def test_compiled_codes_are_the_eager_ones(compiled: Kernels, mid_rise: bool) -> None:
    x, scale = torch.randn(200, 120, requires_grad=True), torch.tensor([0.3])
    grid = (-2, 1) if mid_rise else (-8, 7)
    zero_point = torch.tensor([-0.5 if mid_rise else 2.0])
    found = []
    for chosen in (EAGER, compiled):
        use_kernels(chosen)
        out = fake_quantize(x, scale, zero_point, *grid, mid_rise=mid_rise, exact_gradient=False, with_codes=True)
        codes = Codes.of(out)
        assert codes is not None and torch.equal(dequantize(*codes, out.dtype), out)
        found.append(codes.codes)
    assert torch.equal(*found)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("options", [{}, {"exact_gradient": False}, {"learned": False, "exact_gradient": False}])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], per_channel: bool) -> None:
    for shape in ((7, 50), (9, 1), (7, 61)):  # of the last one a block is a column
        x, scale = torch.randn(shape), torch.rand(shape[0] if per_channel else 1) + 0.1
        monkeypatch.setattr(passes, "BLOCK", 2**18)
        whole = run(EAGER, x, scale, **options)
        for block in (2, 8, 60):  # more than 4 blocks; a row in several, several rows in one
            monkeypatch.setattr(passes, "BLOCK", block)
            flat = Layout.of(x, scale.numel(), 0).flat(x)
            assert len(passes._blocks(flat)) > 1 or x.numel() <= 4 * block
            parts = run(EAGER, x, scale, **options)
            assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
            for part, expected in zip(parts[2:], whole[2:], strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_channel", [False, True])
def test_kernels_see_what_statistics_sum(
    compiled: Kernels, monkeypatch: pytest.MonkeyPatch, per_channel: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(40, 5, 33) + 2.0).to(dtype)
    dim, channels = (1, 5) if per_channel else (None, 1)
    expected, count = sums(x.double(), dim)
    view = (40, 5, 33) if per_channel else (1, 1, x.numel())
    one = torch.ones(1, channels, 1)
    assert count == x.numel() // channels
    for block in (2**18, 100):
        monkeypatch.setattr(passes, "BLOCK", block)
        for chosen in (EAGER, compiled):
            found = chosen.quantize(x.view(view), one, -8 * one, 7 * one, False, "residual", False, True)
            for ours, theirs in zip((found.total, found.square), expected, strict=True):
                torch.testing.assert_close(ours.view(-1).double(), theirs, rtol=1e-5, atol=1e-3)
    without = EAGER.quantize(x.view(view), one, -8 * one, 7 * one, False, "residual", False, False)
    assert without.total is None and without.square is None


def timed(compiled_ms: float) -> Any:
    return lambda chosen, x: ((x,), 5.0 if chosen is EAGER else compiled_ms)


def broken(chosen: Kernels, x: Tensor) -> tuple[tuple[Tensor, ...], float]:
    use_kernels(chosen)
    raise RuntimeError("no working C++ compiler found\nmore")


def halved(chosen: Kernels, x: Tensor, measure: Any = kernels._forward_backward) -> tuple[tuple[Tensor, ...], float]:
    results, ms = measure(EAGER, x)
    return (results if chosen is EAGER else (*results[:2], results[2] / 2)), ms


@pytest.mark.parametrize(
    ("mode", "steps", "measured", "said"),
    [
        ("auto", 1000, timed(1.0), "native (native 1.0 ms, eager 5.0 ms on"),
        ("auto", kernels.MIN_STEPS - 1, timed(1.0), "native (native 1.0 ms, eager 5.0 ms on"),
        ("auto", 1000, timed(9.0), "eager (torch.compile 9.0 ms, eager 5.0 ms on"),
        ("auto", kernels.MIN_STEPS - 1, timed(9.0), "eager (native 9.0 ms, eager 5.0 ms on"),
        ("on", 1000, timed(9.0), "native (native 9.0 ms, eager 5.0 ms on"),
        ("on", 1000, broken, "eager, torch.compile failed: no working C++ compiler found"),
        ("on", 1000, halved, "eager, the kernels of torch.compile compute something else"),
        ("off", 10**6, lambda *_: pytest.fail("measured"), None),
    ],
)
def test_the_faster_kernels_are_chosen_if_they_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: Any, steps: int, measured: Any, said: Any
) -> None:
    monkeypatch.setattr(kernels, "_forward_backward", measured)
    monkeypatch.setattr(kernels, "ACTIVATION", (64, 64))
    taken = said is not None and said.startswith("native")
    with caplog.at_level(logging.INFO, "qsam2"):
        assert choose_kernels(mode, steps, CPU) is taken
    assert fake_quant._chosen is (native_kernels() if taken else EAGER)
    if said is not None:
        assert caplog.messages[-1].startswith(f"fake quantization: {said}") and "more" not in caplog.text


@pytest.mark.parametrize(
    ("device", "precision"), [(CPU, "bf16-mixed"), (torch.device("cuda"), "32-true")], ids=["bf16", "cuda"]
)
def test_native_kernels_are_for_float32_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, precision: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(kernels, "_take", lambda name, *_: asked.append(name) or False)
    assert not choose_kernels("on", 1000, device, precision)
    assert asked == ["torch.compile"]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2100)),
    mid_rise=st.booleans(),
    keep=st.sampled_from(["residual", "mask", "nothing"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_native_passes_equal_the_eager_ones_to_the_last_bit(
    shape: tuple[int, int, int], mid_rise: bool, keep: Any, flags: tuple[bool, bool, bool, bool], seed: int
) -> None:
    """All but sums, whose terms are added in another order; ties, edges, infinities and NaN are among the values."""
    with_codes, exact, needs_x, residual_gradient = flags
    native, generator = native_kernels(), torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator)
    scale = 2.0 ** torch.randint(-2, 2, (1, shape[1], 1), generator=generator)
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, (2 * x / scale).round() / 2 * scale, x)
    low = torch.randint(-4, 1, scale.shape, generator=generator) - 0.5 * mid_rise
    high = low + 3
    ours, theirs = (each.quantize(x, scale, low, high, mid_rise, keep, with_codes, True) for each in (native, EAGER))
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if name in ("total", "square"):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        else:
            assert (a is None and b is None) or torch.equal(a, b), name
    if keep == "residual":
        grad, saved = torch.randn(shape, generator=generator), x if exact else theirs.byte
        options = mid_rise, exact, needs_x, True, residual_gradient
        ours_g, theirs_g = (each.gradients(saved, grad, scale, low, high, *options) for each in (native, EAGER))
        assert (ours_g.x is None) == (not needs_x) and (ours_g.x is None or torch.equal(ours_g.x, theirs_g.x))
        for a, b in zip(ours_g[1:], theirs_g[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    if with_codes:
        assert torch.equal(native.dequantize(ours.codes, scale, low, torch.float32), theirs.out)
    odd = torch.tensor([math.inf, -math.inf, math.nan]).view(1, 1, 3)
    one = torch.ones(1, 1, 1)
    out = native.quantize(odd, one, -2 * one, one, False, "residual", False, False).out
    torch.testing.assert_close(out, torch.tensor([1.0, -2.0, math.nan]).view(1, 1, 3), equal_nan=True, rtol=0, atol=0)


def test_native_kernels_are_compiled_once_and_a_failure_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load()
    (library,) = (tmp_path / "qsam2").iterdir()
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    native._load()
    assert library.stat().st_mtime_ns == written
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    (tmp_path / "file").write_text("no folder")
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        patch.setattr(native.tempfile, "tempdir", str(tmp_path))
        assert native._load().qsam2_quantize
    assert not list(tmp_path.glob("qsam2-*")), "without a cache the library lies in a folder that is removed again"
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho nothing works >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(OSError, match="compiler fails: nothing works"):
        native._load()
    assert list((tmp_path / "other" / "qsam2").iterdir()) == []
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with pytest.raises(OSError, match="there is no C\\+\\+ compiler .*compiler, g\\+\\+, clang"):
        native._load()


def test_small_tensors_and_inference_stay_eager() -> None:
    def fail(*_: object) -> tuple[Tensor, None]:
        pytest.fail("not the eager kernel")

    use_kernels(Kernels(fail, fail, fail, min_elements=100))
    x, scale, zero_point = torch.randn(99, requires_grad=True), torch.ones(1), torch.zeros(1)
    fake_quantize(x, scale, zero_point, -8, 7).sum().backward()
    with torch.no_grad():
        fake_quantize(torch.randn(1000), scale, zero_point, -8, 7)
