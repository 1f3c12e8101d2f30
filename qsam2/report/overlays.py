"""Masks drawn over frames, an object in one colour everywhere: a frame, a contact sheet, a film, a run's tracked clips.

A run keeps films of its first videos and pictures of the frames on which the quantized model agrees least with the
float model, both of four panels: truth, float, quantized, their difference.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Predictions, Video
from qsam2.evaluation.metrics.jf import region_similarity
from qsam2.output import encodable, write_bytes

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Okabe and Ito's palette, which colour-blind people can tell apart; one colour per object."""
OPACITY = 0.5
COLUMN_PX, MARGIN_PX, LABEL_PX = 240, 4, 20
"""Cells of a contact sheet, labels of panels."""
SHOWN = 3
"""Number of films."""
MAX_FRAMES = 100
"""First frames of a video that its film shows: the page stays small."""
FRAMES_PER_SECOND = 10
FILM = {"crf": "30", "preset": "veryfast", "threads": "1"}
"""Options of x264: small files, the same on every machine."""
WORST = 5
"""Number of worst frames."""
APART = 5
"""Least distance in frames between two worst frames of a video: neighbours look alike."""
PANEL_PX = 320
LOST, GAINED, CONFUSED = (213, 94, 0), (86, 180, 233), (204, 121, 167)
"""Colours of the difference: pixels of the reference alone, of the model alone, and of another object."""


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
            label = [encodable(video.name)] * (row == column == 0) + [name] * (column == 0) + [f"frame {index}"]
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

    `options` of x264 are, e.g., `crf` (constant rate factor: smaller is better and larger).
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


def save_clips(
    folder: Path, videos: Sequence[Video], tracked: Mapping[str, Predictions], frames: int | None
) -> dict[str, Any]:
    """Write films of the first videos and the worst frames of all into a folder; returns what there is."""
    shown: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for video in videos:
        clip = TrackedVideo.of(video, tracked, frames)
        if clip is None:
            continue
        scored += frame_scores(clip)
        if len(shown) < SHOWN:
            shown.append(_keep_clip(folder, f"clip{len(shown)}", clip))
    worst = worst_frames(scored)
    by_name = {video.name: video for video in videos}
    for index, row in enumerate(worst):
        clip = TrackedVideo.of(by_name[row["video"]], tracked, frames)
        assert clip is not None
        row["picture"] = f"worst{index}.jpg"  # a video's name need not be one of a file
        write_bytes(folder / row["picture"], _jpeg(panels(clip, row["frame"])))
    return {"models": list(tracked), "clips": shown, "worst": worst}


def frame_scores(clip: TrackedVideo) -> list[dict[str, Any]]:
    """One row per frame: {"video", "frame", "J": {model: against truth}, "to_float": {model: against float masks}}.

    Means over objects, in percent. `J` is None if a frame is not annotated. The first frame, the prompt, is left out.
    """
    rows = []
    for index in range(1, clip.length):
        truth, reference = clip.truth(index), clip.at("float", index)
        masks = {model: clip.at(model, index) for model in clip.masks}
        j = {model: _mean_j(found, truth) for model, found in masks.items()} if truth else None
        to_float = {model: _mean_j(found, reference) for model, found in masks.items() if model != "float"}
        rows.append({"video": clip.video.name, "frame": index, "J": j, "to_float": to_float})
    return rows


def worst_frames(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Frames of lowest J of the quantized model against the float model (float run: against truth).

    Frames of one video are at least `APART` apart.
    """

    def key(row: Mapping[str, Any]) -> float:
        return row["to_float"]["quantized"] if "quantized" in row["to_float"] else row["J"]["float"]

    worst: list[dict[str, Any]] = []
    for row in sorted((row for row in rows if row["to_float"] or row["J"]), key=key):
        near = (other for other in worst if other["video"] == row["video"])
        if len(worst) < WORST and all(abs(other["frame"] - row["frame"]) >= APART for other in near):
            worst.append(dict(row))
    return worst


def panels(clip: TrackedVideo, index: int) -> np.ndarray:
    """Four panels of a frame, two by two, uint8 (H, W, 3) of even size: truth, float, quantized, their difference.

    Float run: frame, truth, float, the difference of the last two.
    """
    frame, truth = clip.video.frame(index), clip.truth(index)
    reference = clip.at("float", index)
    cells = [
        ("truth" if truth else "truth: not annotated", overlay(frame, list((truth or {}).values()))),
        ("float", overlay(frame, list(reference.values()))),
    ]
    if "quantized" in clip.masks:
        masks = clip.at("quantized", index)
        cells += [
            ("quantized", overlay(frame, list(masks.values()))),
            ("quantized against float", difference(frame, reference, masks)),
        ]
    else:
        cells = [("frame", frame), *cells, ("float against truth", difference(frame, truth or reference, reference))]
    height = (LABEL_PX + round(PANEL_PX * clip.video.size[0] / clip.video.size[1])) // 2 * 2
    sheet = Image.new("RGB", (2 * PANEL_PX, 2 * height), "white")
    font = ImageFont.load_default(LABEL_PX - 6)
    for place, (label, picture) in enumerate(cells):
        left, top = place % 2 * PANEL_PX, place // 2 * height
        sheet.paste(Image.fromarray(picture).resize((PANEL_PX - 2, height - LABEL_PX - 2)), (left, top + LABEL_PX))
        text = f"{label}, frame {index}" if place == 0 else label
        ImageDraw.Draw(sheet).text((left + 4, top + 1), text, fill="black", font=font)
    return np.asarray(sheet)


def difference(frame: np.ndarray, reference: Mapping[int, np.ndarray], masks: Mapping[int, np.ndarray]) -> np.ndarray:
    """A pale grey frame on which differing pixels of the same objects' masks, {id: bool (H, W)}, are coloured.

    `LOST` and `GAINED`: an object in one of both only. `CONFUSED`: different objects.
    """
    grey = frame.mean(axis=2, keepdims=True).repeat(3, axis=2)
    drawn = (0.4 * grey + 0.6 * 255).astype(np.uint8)
    expected, actual = _union(reference), _union(masks)
    drawn[_union({item: masks[item] ^ reference[item] for item in masks})] = CONFUSED
    drawn[expected & ~actual] = LOST
    drawn[actual & ~expected] = GAINED
    return drawn


def _keep_clip(folder: Path, name: str, clip: TrackedVideo) -> dict[str, Any]:
    count = min(clip.length, MAX_FRAMES)
    film = io.BytesIO()
    frames = (panels(clip, index) for index in range(count))
    write_video(film, frames, frames_per_second=FRAMES_PER_SECOND, **FILM)
    write_bytes(folder / f"{name}.mp4", film.getvalue())
    write_bytes(folder / f"{name}.jpg", _jpeg(panels(clip, count // 2)))
    row = {"video": clip.video.name, "file": name, "frames": count, "of": clip.length}
    return {**row, "frames_per_second": FRAMES_PER_SECOND, "objects": len(clip.object_ids)}


def _mean_j(masks: Mapping[int, np.ndarray], reference: Mapping[int, np.ndarray]) -> float:
    scores = [region_similarity(masks[item][None], reference[item][None])[0] for item in masks]
    return float(100 * np.mean(scores))


def _union(masks: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.logical_or.reduce(list(masks.values()))


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
