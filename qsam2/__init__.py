"""qsam2: quantization of Segment Anything Model 2, by training (QAT) and after it (PTQ)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsam2.predictors import image_predictor, load, video_predictor

__version__ = "0.1.0"
__all__ = ["image_predictor", "load", "video_predictor"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for: the command line starts without it."""
    if name not in __all__:
        raise AttributeError(f"module 'qsam2' has no attribute {name!r}")
    from qsam2 import predictors

    return getattr(predictors, name)
