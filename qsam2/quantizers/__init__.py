"""Quantizers: one base, one fake-quantization operation, the methods by family, one registry."""

from __future__ import annotations

# importing a method registers it in QUANTIZERS
from qsam2.quantizers import calibrated, clips, lsq, weight_statistics  # noqa: F401
from qsam2.quantizers.base import Quantizer, QuantizerState, build_quantizer

__all__ = ["Quantizer", "QuantizerState", "build_quantizer"]
