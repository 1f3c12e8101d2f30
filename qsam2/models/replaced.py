"""Context managers that temporarily replace attributes of a module or a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sam2 import sam2_video_predictor


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of `owner` and restore them on exit, also after an error."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def hide_progress_bar() -> contextlib.AbstractContextManager[None]:
    """Hide the progress bar that sam2 shows per video: scores and benchmarks have their own."""
    return replaced(sam2_video_predictor, tqdm=lambda frames, **_: frames)
