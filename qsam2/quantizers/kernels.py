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
from typing import Literal

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

Compile = Literal["auto", "on", "off"]

log = logging.getLogger("qsam2")


@functools.cache
def compiled_kernels() -> Kernels:
    """Kernels through `torch.compile`, compiled at their first call, which raises without a working compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return Kernels(
        torch.compile(quantize_pass, dynamic=True, fullgraph=True),
        torch.compile(gradient_pass, dynamic=True, fullgraph=True),
        torch.compile(dequantize_pass, dynamic=True, fullgraph=True),
        MIN_ELEMENTS,
    )


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
        _forward_backward_ms(compiled_kernels(), x)
    except (RuntimeError, ImportError, OSError) as error:  # raised by torch.compile without a working compiler
        use_kernels(EAGER)
        log.warning("fake quantization: eager, torch.compile failed: %s", str(error).strip().partition("\n")[0])
        return False
    compile_s = time.perf_counter() - started
    times: dict[Kernels, list[float]] = {EAGER: [], compiled_kernels(): []}
    for _ in range(5):
        for kernels, measured in times.items():
            measured.append(_forward_backward_ms(kernels, x))
    eager_ms, compiled_ms = (statistics.median(measured) for measured in times.values())
    compiled = mode == "on" or compiled_ms < eager_ms
    use_kernels(compiled_kernels() if compiled else EAGER)
    log.info(
        "fake quantization: %s (compiled %.1f ms, eager %.1f ms on an activation; compiling took %.0f s)",
        "compiled" if compiled else "eager",
        compiled_ms,
        eager_ms,
        compile_s,
    )
    return compiled


def _forward_backward_ms(kernels: Kernels, x: Tensor) -> float:
    """Milliseconds of one forward and backward of x with a learned step."""
    use_kernels(kernels)
    x = x.detach().requires_grad_()
    scale = torch.full((1,), 0.3, device=x.device, requires_grad=True)
    started = _now_ms(x.device)
    fake_quantize(x, scale, torch.zeros_like(scale), -8, 7, exact_gradient=False).backward(x.detach())
    return _now_ms(x.device) - started


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()
