"""Compiled kernels of the fake-quantization operation, and the choice between them and the eager ones (ours).

The passes of `passes` are compiled as they stand, so both versions compute the same: each pass becomes one loop
that reads the tensor once. They differ by one quantum at rounding ties at most, and in the order of the sums. Sizes
are dynamic: a kernel is compiled once a granularity, grid, dtype and number of dimensions, not once a layer.
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
"""Below, the call of a compiled kernel takes longer than the eager one; sizes 0 and 1 would be compiled apart."""

MIN_STEPS = 150
"""Training steps from which compiling, about half a minute, pays on nano; on tiny at 512 px a dozen would do."""

VARIANTS = 64
"""Of a kernel: granularity, grid, dtype and what is learned; PyTorch's own limit is 8."""

ACTIVATION = (4, 4096, 384)
"""What the choice is measured on: stage 3 of Hiera-T for four frames at 1024 px."""

Compile = Literal["auto", "on", "off"]

log = logging.getLogger("qsam2")


@functools.cache
def compiled_kernels() -> Kernels:
    """The kernels through `torch.compile`; a kernel is compiled when it first runs, which raises without a compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return Kernels(
        torch.compile(quantize_pass, dynamic=True, fullgraph=True),
        torch.compile(gradient_pass, dynamic=True, fullgraph=True),
        torch.compile(dequantize_pass, dynamic=True, fullgraph=True),
        MIN_ELEMENTS,
    )


@functools.cache
def choose_kernels(mode: Compile, max_steps: int, device: torch.device) -> bool:
    """Choose what trains from now on, say it in the log, and return whether it is the compiled kernels.

    "auto" takes the faster on `device` where training is long enough to pay for compiling, "on" the compiled ones
    wherever there is a compiler, "off" the eager ones.
    """
    use_kernels(EAGER)
    if mode == "off" or (mode == "auto" and max_steps < MIN_STEPS):
        return False
    x = torch.randn(ACTIVATION, device=device)
    started = time.perf_counter()
    try:
        _forward_backward_ms(compiled_kernels(), x)
    except (RuntimeError, ImportError, OSError) as error:  # what torch.compile raises without a working compiler
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
    """Milliseconds of quantizing x with a learned step and back."""
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
