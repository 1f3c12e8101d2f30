"""Compiled kernels of the fake-quantization operation, and the choice between native, compiled and eager ones (ours).

`torch.compile` turns each pass of `passes` into one loop that reads the tensor once. Compiled and eager results differ
by at most one quantum at rounding ties, and in the order of summation. Sizes are dynamic: one compilation serves a
granularity, grid, dtype and number of dimensions, not a layer.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from qsam2.quantizers.fake_quant import EAGER, Kernels, fake_quantize, use_kernels
from qsam2.quantizers.native import native_kernels
from qsam2.quantizers.passes import dequantize_pass, gradient_pass, quantize_pass

MIN_ELEMENTS = 2**14
"""Below, a compiled kernel is slower than the eager one; sizes 0 and 1 would need compilations of their own."""

MIN_STEPS = 150
"""Training steps that make up for half a minute of compilation on nano; tiny at 512 px needs a dozen."""

VARIANTS = 64
"""Allowed compilations per kernel (granularity, grid, dtype, learned parameters); PyTorch's default limit is 8."""

ACTIVATION = (4, 4096, 384)
"""Shape that the choice is timed on: stage 3 of Hiera-T for four frames at 1024 px."""

TIES = 1e-3
"""Share of values that compiled and eager kernels may round differently."""

Compile = Literal["auto", "on", "off"]

log = logging.getLogger("qsam2")


@functools.cache
def compiled_kernels() -> Kernels:
    """Kernels through `torch.compile`, compiled at their first call, which raises without a working compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    passes: tuple[Callable[..., Any], ...] = (quantize_pass, gradient_pass, dequantize_pass)
    quantize, gradients, dequantize = (torch.compile(kernel, dynamic=True, fullgraph=True) for kernel in passes)
    return Kernels(quantize, gradients, dequantize, MIN_ELEMENTS)


@functools.cache
def choose_kernels(mode: Compile, max_steps: int, device: torch.device, precision: str = "32-true") -> bool:
    """Choose and log the kernels for training; False for the eager ones.

    The native kernels serve float32 on a CPU and compile in seconds, `torch.compile` all else. "auto" takes them where
    they are faster on `device`, and `torch.compile` only if training is long enough to pay for it; "on" wherever there
    is a compiler; "off" never.
    """
    use_kernels(EAGER)
    if mode == "off":
        return False
    if device.type == "cpu" and precision == "32-true" and _take("native", native_kernels, mode, device):
        return True
    if mode == "auto" and max_steps < MIN_STEPS:
        return False
    return _take("torch.compile", compiled_kernels, mode, device)


def _take(name: str, build: Callable[[], Kernels], mode: Compile, device: torch.device) -> bool:
    """Use these kernels if they work and are faster than the eager ones (or `mode` is "on"); log the choice."""
    x = torch.randn(ACTIVATION, device=device)
    started = time.perf_counter()
    try:
        kernels = build()
        compiled, _ = _forward_backward(kernels, x)
    except (RuntimeError, ImportError, OSError) as error:  # raised without a working compiler
        use_kernels(EAGER)
        log.warning("fake quantization: eager, %s failed: %s", name, str(error).strip().partition("\n")[0])
        return False
    compile_s = time.perf_counter() - started
    eager, _ = _forward_backward(EAGER, x)
    # rounding at ties may differ, and so may the order of summation
    differs = [~torch.isclose(x, y, rtol=1e-2, atol=1e-6) for x, y in zip(compiled, eager, strict=True)]
    if any(part.float().mean() > TIES for part in differs):
        use_kernels(EAGER)
        log.warning(
            "fake quantization: eager, the kernels of %s compute something else: empty its cache "
            "(TORCHINDUCTOR_CACHE_DIR, or qsam2 in XDG_CACHE_HOME), which may be of another processor", name
        )  # fmt: skip
        return False
    times: dict[Kernels, list[float]] = {EAGER: [], kernels: []}
    for _ in range(5):
        for each, measured in times.items():
            measured.append(_forward_backward(each, x)[1])
    eager_ms, compiled_ms = (statistics.median(measured) for measured in times.values())
    faster = mode == "on" or compiled_ms < eager_ms
    use_kernels(kernels if faster else EAGER)
    times_ms = f"{name} {compiled_ms:.1f} ms, eager {eager_ms:.1f} ms"
    chosen = name if faster else "eager"
    log.info("fake quantization: %s (%s on an activation; compiling took %.0f s)", chosen, times_ms, compile_s)
    return faster


def _forward_backward(kernels: Kernels, x: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """Fake-quantized x with the gradients of x and of a learned step, and the milliseconds of both passes."""
    use_kernels(kernels)
    x = x.detach().requires_grad_()
    scale = torch.full((1,), 0.3, device=x.device, requires_grad=True)
    started = _now_ms(x.device)
    y = fake_quantize(x, scale, torch.zeros_like(scale), -8, 7, exact_gradient=False)
    y.backward(x.detach())
    assert x.grad is not None and scale.grad is not None
    return (y.detach(), x.grad, scale.grad), _now_ms(x.device) - started


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()
