"""Native kernels of the fake-quantization operation, for float32 tensors on a CPU (ours).

`native.cpp` is compiled once per machine, in seconds, by the compiler that `torch.compile` needs as well, and kept in
the user's cache. One call takes microseconds, so that small tensors gain most: the eager kernels take 86 operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qsam2.quantizers.fake_quant import EAGER, Kernels
from qsam2.quantizers.passes import Gradients, Keep, Quantized

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
EXACT = ("-ffp-contract=off", "-shared", "-fPIC")
"""No fused multiply-adds: they round otherwise than the eager kernels."""
KEEP: dict[Keep, int] = {"nothing": 0, "mask": 1, "residual": 2}
TIMEOUT_S = 120
PROCESSOR = ("model name", "flags", "Features")
"""Beginnings of the lines of /proc/cpuinfo that tell processors apart."""

log = logging.getLogger("qsam2")


@functools.cache
def native_kernels() -> Kernels:
    """The kernels, compiled if need be.

    Raises:
        OSError: there is no C++ compiler, or it fails.
    """
    library = _load()

    def quantize(
        x: Tensor,
        scale: Tensor,
        low: Tensor,
        high: Tensor,
        mid_rise: bool,
        keep: Keep,
        with_codes: bool,
        with_sums: bool,
    ) -> Quantized:
        if not _fits(x, scale, low, high):
            return EAGER.quantize(x, scale, low, high, mid_rise, keep, with_codes, with_sums)
        x, scale, low, high = x.contiguous(), scale.contiguous(), low.contiguous(), high.contiguous()
        channels = x.shape[1]
        out = torch.empty_like(x)
        byte = torch.empty_like(x, dtype=torch.int8) if keep != "nothing" else None
        codes = torch.empty_like(x, dtype=torch.uint8) if with_codes else None
        sums = torch.zeros(2, 1, channels, 1, dtype=torch.float64) if with_sums else None
        library.qsam2_quantize(
            *_pointers(x, scale, low, high), *x.shape, mid_rise, KEEP[keep], with_codes, with_sums,
            *_pointers(out, byte, codes, sums),
        )  # fmt: skip
        total, square = (None, None) if sums is None else sums.to(x.dtype)
        return Quantized(out, byte, codes, total, square)

    def gradients(
        saved: Tensor,
        grad: Tensor,
        scale: Tensor,
        low: Tensor,
        high: Tensor,
        mid_rise: bool,
        exact: bool,
        needs_x: bool,
        learned: bool,
        residual_gradient: bool,
    ) -> Gradients:
        if not _fits(grad, scale, low, high) or (exact and saved.dtype != torch.float32):
            flags = mid_rise, exact, needs_x, learned, residual_gradient
            return EAGER.gradients(saved, grad, scale, low, high, *flags)
        saved, grad = saved.contiguous(), grad.contiguous()
        scale, low, high = scale.contiguous(), low.contiguous(), high.contiguous()
        grad_x = torch.empty_like(grad) if needs_x else None
        sums = torch.zeros(1, grad.shape[1], 1, 3, dtype=torch.float64)
        library.qsam2_gradients(
            *_pointers(saved, grad, scale, low, high), *grad.shape, mid_rise, exact, needs_x, learned,
            *_pointers(grad_x, sums),
        )  # fmt: skip
        if not learned:
            return Gradients(grad_x, None, None)
        below, above, within = sums.to(grad.dtype).unbind(-1)
        grad_scale = low * below + high * above
        return Gradients(grad_x, grad_scale + within if residual_gradient else grad_scale, -scale * (below + above))

    def dequantize(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype != torch.float32 or not _fits(scale, scale, low, low):
            return EAGER.dequantize(codes, scale, low, dtype)
        codes, scale, low = codes.contiguous(), scale.contiguous(), low.contiguous()
        out = torch.empty(codes.shape)
        library.qsam2_dequantize(*_pointers(codes, scale, low), *codes.shape, *_pointers(out))
        return out

    return Kernels(quantize, gradients, dequantize, min_elements=0)


def _fits(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def _load() -> ctypes.CDLL:
    source = Path(str(importlib.resources.files("qsam2.quantizers") / "native.cpp"))
    named = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    compiler = next((found for name in named if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"there is no C++ compiler ({', '.join(named)})")
    causes = [source.read_text(), compiler, *FLAGS, *EXACT, _processor()]
    name = f"native-{hashlib.sha256(chr(0).join(causes).encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsam2"
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        kept = (cache / name).is_file() or os.access(cache, os.W_OK)
        # a folder of others among the temporary files could hold any library: one of this process alone
        folder = cache if kept else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qsam2-")))
        if not (folder / name).is_file():
            _compile(compiler, source, folder / name)
        library = ctypes.CDLL(str(folder / name))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.qsam2_quantize.argtypes = [*[pointer] * 4, *[size] * 3, *[ctypes.c_int] * 4, *[pointer] * 4]
    library.qsam2_gradients.argtypes = [*[pointer] * 5, *[size] * 3, *[ctypes.c_int] * 4, *[pointer] * 2]
    library.qsam2_dequantize.argtypes = [*[pointer] * 3, *[size] * 3, pointer]
    for function in (library.qsam2_quantize, library.qsam2_gradients, library.qsam2_dequantize):
        function.restype = None
    return library


def _processor() -> str:
    """What `-march=native` means here: a library of another machine that shares the cache is not loaded."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in PROCESSOR)


def _compile(compiler: str, source: Path, file: Path) -> None:
    log.info("fake quantization: compiling the native kernels ...")
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        command = [compiler, *FLAGS, *EXACT, str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{compiler} fails: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        os.replace(unfinished, file)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{compiler} takes more than {TIMEOUT_S} s") from error
    finally:
        unfinished.unlink(missing_ok=True)
