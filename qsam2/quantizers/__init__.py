"""Quantizers: one base, one fake-quantization operation, one file a method, one registry."""

from __future__ import annotations

from qsam2.quantizers import lsc, lsq, minmax  # noqa: F401  (importing a method registers it)
from qsam2.quantizers.base import Quantizer, QuantizerState
from qsam2.quantizers.registry import build_quantizer

__all__ = ["Quantizer", "QuantizerState", "build_quantizer"]
