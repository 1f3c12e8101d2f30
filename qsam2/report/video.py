"""Frames as a small video that browsers play."""

from __future__ import annotations

import io
from collections.abc import Iterable

import av
import numpy as np

FRAMES_PER_SECOND = 10
QUALITY = "30"
"""x264's constant rate factor: smaller is better and larger."""


def encode_video(frames: Iterable[np.ndarray], *, frames_per_second: int = FRAMES_PER_SECOND) -> bytes:
    """H.264 in MP4 of RGB frames, uint8 (H, W, 3), of one size, H and W even."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=frames_per_second)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": QUALITY, "preset": "veryfast", "threads": "1"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
    return buffer.getvalue()
