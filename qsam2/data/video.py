"""The one type that every data source gives: a video with object masks, read frame by frame."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Video(ABC):
    """A video with object masks; a still is a video of one frame. Frames and masks are read when asked for.

    Attributes:
        name: unique within its dataset, used as the folder name of its predictions.
        frame_names: one stem a frame, in order (``"00000"``): the name of the frame's mask file.
        size: (height, width) in pixels, the same for all frames.
    """

    name: str
    frame_names: list[str]
    size: tuple[int, int]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frame_names)

    @abstractmethod
    def frame(self, index: int) -> np.ndarray:
        """Frame ``index`` as RGB, uint8 (H, W, 3)."""

    @abstractmethod
    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        """Masks of frame ``index``: {object id > 0: bool (H, W)}; objects out of view may be absent or all False.

        None where the frame is not annotated (SA-V annotates every fourth frame, YouTube-VOS every fifth).
        """


Predictions = dict[tuple[str, int], np.ndarray]
"""Tracked masks by (video, object id), packed eight pixels a byte: a few MB for a video instead of a hundred."""
