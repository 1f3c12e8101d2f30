"""Files of small datasets: pictures, masks, annotations, films; and the check of a one-line error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from qsam2.data.video import Video
from qsam2.errors import UserError


def check(message: str, action: Callable[[], Any]) -> None:
    """The action raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def save(path: Path, content: Any, mode: str | None = None) -> Path:
    """Write pixels as a picture (of a PIL mode), bytes and text as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        image = Image.fromarray(content, mode)
        if mode == "P":
            image.putpalette([component for i in range(256) for component in (i, 255 - i, 128)])
        image.save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def film(path: Path, frames: Iterable[np.ndarray], gop: int = 4, **options: str) -> Path:
    """A video file of RGB frames, with B frames and a key frame in every `gop`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = list(frames)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=24)
        (stream.height, stream.width), stream.pix_fmt = frames[0].shape[:2], "yuv420p"
        stream.gop_size, stream.max_b_frames, stream.bit_rate = gop, 2, 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length code."""
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


class Held(Video):
    """A video held in memory; masks of a frame are None where it is not annotated."""

    def __init__(self, pictures: Sequence[np.ndarray], masks: Sequence[Any], name: str = "held") -> None:
        self.name, self.size = name, pictures[0].shape[:2]
        self.frame_names = [f"{i:05d}" for i in range(len(pictures))]
        self._pictures, self._masks = pictures, masks

    def frame(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        return self._masks[index]


def made(name: str = "made", frames: int = 12, visible: dict[int, Any] | None = None, annotated: Any = None) -> Held:
    """Frames of 20 x 28 that show their number; object k is visible in the frames of `visible[k]`."""
    size, visible = (20, 28), {1: range(frames)} if visible is None else visible
    masks = [{k: box(size, 4, 4, 4 + k, 12 + k) for k, where in visible.items() if i in where} for i in range(frames)]
    video = Held([np.full((*size, 3), 10 * i, np.uint8) for i in range(frames)], masks, name)
    if annotated is not None:
        video.annotated_frames = annotated
        video._masks = [frame if i in annotated else None for i, frame in enumerate(masks)]
    return video
