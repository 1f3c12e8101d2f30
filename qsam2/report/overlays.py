"""Tracked masks drawn over their frames, and frames as a small video."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Predictions, Video

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Okabe and Ito's palette, told apart by the colour-blind; an object a colour."""
OPACITY = 0.5
COLUMN_PX, MARGIN_PX, LABEL_PX = 240, 4, 20


def overlay(frame: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """A frame (H, W, 3) uint8 with masks, each bool (H, W), tinted and outlined."""
    drawn = frame.astype(np.float32)
    outlines = []
    for index, mask in enumerate(masks):
        colour = COLOURS[index % len(COLOURS)]
        drawn[mask] = (1 - OPACITY) * drawn[mask] + OPACITY * np.array(colour, dtype=np.float32)
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outlines.append((contours, colour))
    picture = np.ascontiguousarray(drawn.round().astype(np.uint8))
    for contours, colour in outlines:
        cv2.drawContours(picture, contours, -1, colour, 1)
    return picture


def contact_sheet(
    video: Video, predictions: Mapping[str, Predictions], *, length: int, columns: int = 4
) -> Image.Image:
    """Frames spread over a video's first `length`, one row per model in `predictions` below one of true masks."""
    chosen = np.linspace(0, length - 1, min(columns, length)).round().astype(int)
    ids = sorted(object_id for name, object_id in next(iter(predictions.values())) if name == video.name)
    first = "truth" if has_masks([video]) else "prompts"
    rows = {first: {i: _truth(video, i, ids) for i in chosen}}
    for model, tracked in predictions.items():
        masks = {object_id: _unpack(tracked[video.name, object_id], length, video.size) for object_id in ids}
        rows[model] = {i: [masks[object_id][i] for object_id in ids] for i in chosen}
    height = LABEL_PX + round(COLUMN_PX * video.size[0] / video.size[1])
    right, down = COLUMN_PX + MARGIN_PX, height + MARGIN_PX
    sheet = Image.new("RGB", (len(chosen) * right - MARGIN_PX, len(rows) * down - MARGIN_PX), "white")
    for row, (model, frames) in enumerate(rows.items()):
        for column, (index, masks_of_frame) in enumerate(frames.items()):
            of_what = [video.name] * (row == column == 0) + [model] * (column == 0) + [f"frame {index}"]
            cell = _cell(overlay(video.frame(int(index)), masks_of_frame), ", ".join(of_what), height)
            sheet.paste(cell, (column * right, row * down))
    return sheet


def _cell(picture: np.ndarray, label: str, height: int) -> Image.Image:
    cell = Image.new("RGB", (COLUMN_PX, height), "white")
    ImageDraw.Draw(cell).text((0, 0), label, fill="black", font=ImageFont.load_default(LABEL_PX - 5))
    cell.paste(Image.fromarray(picture).resize((COLUMN_PX, height - LABEL_PX)), (0, LABEL_PX))
    return cell


def _truth(video: Video, index: int, ids: Sequence[int]) -> list[np.ndarray]:
    masks = video.masks(int(index)) or {}
    return [masks.get(object_id, np.zeros(video.size, dtype=bool)) for object_id in ids]


def _unpack(packed: np.ndarray, length: int, size: tuple[int, int]) -> np.ndarray:
    count = length * size[0] * size[1]
    return np.unpackbits(packed, count=count).reshape(length, *size).astype(bool)


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
