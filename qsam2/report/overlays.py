"""Masks drawn over frames, an object in one colour everywhere: a frame, a contact sheet of a tracked video, a film."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Predictions, Video

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Okabe and Ito's palette, which colour-blind people can tell apart; one colour per object."""
OPACITY = 0.5
COLUMN_PX, MARGIN_PX, LABEL_PX = 240, 4, 20
"""Cells of a contact sheet."""


def overlay(frame: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """A frame (H, W, 3) uint8 with masks, each bool (H, W), tinted and outlined."""
    coloured = list(zip(masks, itertools.cycle(COLOURS), strict=False))
    drawn = frame.astype(np.float32)
    for mask, colour in coloured:
        drawn[mask] = (1 - OPACITY) * drawn[mask] + OPACITY * np.array(colour, dtype=np.float32)
    picture = np.ascontiguousarray(drawn.round().astype(np.uint8))
    for mask, colour in coloured:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, colour, 1)
    return picture


@dataclass(frozen=True)
class TrackedVideo:
    """A video with each model's masks of it: {model: {object id: bool (T, H, W)}}."""

    video: Video
    length: int
    masks: dict[str, dict[int, np.ndarray]]

    @classmethod
    def of(cls, video: Video, tracked: Mapping[str, Predictions], frames: int | None) -> TrackedVideo | None:
        """The first `frames` frames; None if this process did not track the video."""
        length = min(len(video), frames or len(video))
        ids = sorted(object_id for name, object_id in next(iter(tracked.values())) if name == video.name)
        count = length * video.size[0] * video.size[1]

        def unpack(packed: np.ndarray) -> np.ndarray:
            return np.unpackbits(packed, count=count).reshape(length, *video.size).astype(bool)

        masks = {model: {item: unpack(packed[video.name, item]) for item in ids} for model, packed in tracked.items()}
        return cls(video, length, masks) if ids else None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the tracked objects, ascending."""
        return list(next(iter(self.masks.values())))

    def truth(self, index: int) -> dict[int, np.ndarray] | None:
        """True masks of the tracked objects; None if the frame has none."""
        return self.annotation(index) if has_masks([self.video]) else None

    def annotation(self, index: int) -> dict[int, np.ndarray] | None:
        """The video's own masks of the tracked objects, true ones or prompts; None if the frame has none."""
        masks = self.video.masks(index)
        empty = np.zeros(self.video.size, bool)
        return None if masks is None else {item: masks.get(item, empty) for item in self.object_ids}

    def at(self, model: str, index: int) -> dict[int, np.ndarray]:
        """A model's masks of a frame."""
        return {item: masks[index] for item, masks in self.masks[model].items()}


def contact_sheet(
    video: Video, predictions: Mapping[str, Predictions], *, frames: int | None = None, columns: int = 4
) -> Image.Image:
    """Frames spread over a video's first `frames`, one row per model in `predictions` below one of true masks."""
    clip = TrackedVideo.of(video, predictions, frames)
    assert clip is not None, f"{video.name} was not tracked"
    first = "truth" if has_masks([video]) else "prompts"
    chosen = [int(index) for index in np.linspace(0, clip.length - 1, min(columns, clip.length)).round()]
    height = LABEL_PX + round(COLUMN_PX * video.size[0] / video.size[1])
    right, down = COLUMN_PX + MARGIN_PX, height + MARGIN_PX
    names = [first, *predictions]
    font = ImageFont.load_default(LABEL_PX - 5)
    sheet = Image.new("RGB", (len(chosen) * right - MARGIN_PX, len(names) * down - MARGIN_PX), "white")
    for row, name in enumerate(names):
        for column, index in enumerate(chosen):
            masks = clip.at(name, index) if row else clip.annotation(index) or {}
            label = [video.name] * (row == column == 0) + [name] * (column == 0) + [f"frame {index}"]
            cell = Image.new("RGB", (COLUMN_PX, height), "white")  # clips a long label
            ImageDraw.Draw(cell).text((0, 0), ", ".join(label), fill="black", font=font)
            picture = Image.fromarray(overlay(video.frame(index), list(masks.values())))
            cell.paste(picture.resize((COLUMN_PX, height - LABEL_PX)), (0, LABEL_PX))
            sheet.paste(cell, (column * right, row * down))
    return sheet


def write_video(
    file: str | BinaryIO, frames: Iterable[np.ndarray], *, frames_per_second: Fraction | int, **options: str
) -> None:
    """Write RGB frames, uint8 (H, W, 3) of one size, as H.264 in MP4. An odd side grows by one pixel.

    Args:
        options: of x264, e.g. `crf` (constant rate factor: smaller is better and larger).
    """
    with av.open(file, "w", format="mp4") as container:
        stream = None
        for frame in frames:
            height, width = frame.shape[:2]
            if stream is None:
                stream = container.add_stream("libx264", rate=frames_per_second)
                stream.height, stream.width = height + height % 2, width + width % 2
                stream.pix_fmt = "yuv420p"
                stream.options = dict(options)
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
