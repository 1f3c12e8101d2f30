"""Attributes of another package's module, or of a model, that are others for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sam2 import sam2_video_predictor


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of `owner`, and puts back what they were, whatever happens meanwhile."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def hide_progress_bar() -> contextlib.AbstractContextManager[None]:
    """Without the progress bar that sam2 draws for each video: scores and benchmarks have one of their own."""
    return replaced(sam2_video_predictor, tqdm=lambda frames, **_: frames)
