"""Quantizers: one base, one fake-quantization operation, one file per method, one registry."""

from __future__ import annotations

# importing a method registers it in QUANTIZERS
from qsam2.quantizers import dorefa, lsc, lsq, lsq_plus, minmax, pact, sawb, seq, static, statsq  # noqa: F401
from qsam2.quantizers.base import Quantizer, QuantizerState
from qsam2.quantizers.registry import build_quantizer

__all__ = ["Quantizer", "QuantizerState", "build_quantizer"]
