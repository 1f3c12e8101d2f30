"""Compiled kernels of the fake-quantization operation, and the choice between them and the eager ones (ours).

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
def choose_kernels(mode: Compile, max_steps: int, device: torch.device) -> bool:
    """Choose and log the kernels for training; True for the compiled ones.

    "auto" takes the faster on `device` if training is long enough to pay for compilation, "on" the compiled ones
    wherever there is a compiler, "off" the eager ones.
    """
    use_kernels(EAGER)
    if mode == "off" or (mode == "auto" and max_steps < MIN_STEPS):
        return False
    x = torch.randn(ACTIVATION, device=device)
    started = time.perf_counter()
    try:
        compiled, _ = _forward_backward(compiled_kernels(), x)
    except (RuntimeError, ImportError, OSError) as error:  # raised by torch.compile without a working compiler
        use_kernels(EAGER)
        log.warning("fake quantization: eager, torch.compile failed: %s", str(error).strip().partition("\n")[0])
        return False
    compile_s = time.perf_counter() - started
    eager, _ = _forward_backward(EAGER, x)
    # rounding at ties may differ, and so may the order of summation
    differs = [~torch.isclose(x, y, rtol=1e-2, atol=1e-6) for x, y in zip(compiled, eager, strict=True)]
    if any(part.float().mean() > TIES for part in differs):
        use_kernels(EAGER)
        log.warning(
            "fake quantization: eager, the compiled kernels compute something else: empty torch.compile's cache "
            "(TORCHINDUCTOR_CACHE_DIR), which does not tell processors apart"
        )
        return False
    times: dict[Kernels, list[float]] = {EAGER: [], compiled_kernels(): []}
    for _ in range(5):
        for kernels, measured in times.items():
            measured.append(_forward_backward(kernels, x)[1])
    eager_ms, compiled_ms = (statistics.median(measured) for measured in times.values())
    faster = mode == "on" or compiled_ms < eager_ms
    use_kernels(compiled_kernels() if faster else EAGER)
    name, times_ms = "compiled" if faster else "eager", f"compiled {compiled_ms:.1f} ms, eager {eager_ms:.1f} ms"
    log.info("fake quantization: %s (%s on an activation; compiling took %.0f s)", name, times_ms, compile_s)
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
