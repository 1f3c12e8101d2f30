"""qsam2: quantization of Segment Anything Model 2, by training (QAT) and after it (PTQ)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsam2.api import evaluate, export, quantize
    from qsam2.loading import image_predictor, load, video_predictor

_OFFERED = {
    **dict.fromkeys(("load", "image_predictor", "video_predictor"), "qsam2.loading"),
    **dict.fromkeys(("quantize", "evaluate", "export"), "qsam2.api"),
}
"""Module of each name. It is imported when it is first used, so that `import qsam2` does not wait for torch."""

__all__ = ["evaluate", "export", "image_predictor", "load", "quantize", "video_predictor"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from qsam2.output import version

        return version()
    if name not in _OFFERED:
        raise AttributeError(f"module 'qsam2' has no attribute {name!r}")
    return getattr(importlib.import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
