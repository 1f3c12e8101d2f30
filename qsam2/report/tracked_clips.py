"""Tracked clips for the page: truth, float, quantized and their difference as videos, and the worst frames."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Predictions, Video
from qsam2.evaluation.metrics.jf import region_similarity
from qsam2.report.overlays import FRAMES_PER_SECOND, encode_video, overlay
from qsam2.report.read import CLIPS, save_json, save_media

SHOWN = 3
"""Videos that are shown."""
MAX_FRAMES = 100
"""Frames of each, the first ones: the page stays small."""
WORST = 5
APART = 5
"""Frames of a video between two of the worst: neighbours show the same."""
PANEL_PX, LABEL_PX = 320, 20
LOST, GAINED, CONFUSED = (213, 94, 0), (86, 180, 233), (204, 121, 167)
"""Colours of the difference: pixels of the reference alone, of the model alone, and those of another object."""


@dataclass(frozen=True)
class TrackedVideo:
    """A video with each model's masks of it: {model: {object id: bool (T, H, W)}}."""

    video: Video
    length: int
    masks: dict[str, dict[int, np.ndarray]]

    @classmethod
    def of(cls, video: Video, tracked: Mapping[str, Predictions], frames: int | None) -> TrackedVideo | None:
        """The first `frames` frames; None where this process did not track the video."""
        length = min(len(video), frames or len(video))
        ids = sorted(item for name, item in tracked["float"] if name == video.name)
        count = length * video.size[0] * video.size[1]

        def unpack(packed: np.ndarray) -> np.ndarray:
            return np.unpackbits(packed, count=count).reshape(length, *video.size).astype(bool)

        masks = {model: {item: unpack(found[video.name, item]) for item in ids} for model, found in tracked.items()}
        return cls(video, length, masks) if ids else None

    def truth(self, index: int) -> dict[int, np.ndarray] | None:
        """True masks of the tracked objects; None if the frame has none."""
        masks = self.video.masks(index) if has_masks([self.video]) else None
        if masks is None:
            return None
        empty = np.zeros(self.video.size, bool)
        return {item: masks.get(item, empty) for item in self.masks["float"]}

    def at(self, model: str, index: int) -> dict[int, np.ndarray]:
        """A model's masks of a frame."""
        return {item: masks[index] for item, masks in self.masks[model].items()}


def save_clips(run: Path, videos: Sequence[Video], tracked: Mapping[str, Predictions], frames: int | None) -> None:
    """Write the first videos as clips and the worst frames of all into the run folder, and what they show.

    Raises:
        UserError: the disk is full.
    """
    shown: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for video in videos:
        clip = TrackedVideo.of(video, tracked, frames)
        if clip is None:
            continue
        scored += frame_scores(clip)
        if len(shown) < SHOWN:
            shown.append(_keep_clip(run, f"clip{len(shown)}", clip))
    worst = worst_frames(scored)
    by_name = {video.name: video for video in videos}
    for row in worst:
        clip = TrackedVideo.of(by_name[row["video"]], tracked, frames)
        assert clip is not None
        row["picture"] = f"worst_{row['video']}_{row['frame']}.jpg"
        save_media(run, row["picture"], _jpeg(panels(clip, row["frame"])))
    save_json(run, CLIPS, {"models": list(tracked), "clips": shown, "worst": worst})


def frame_scores(clip: TrackedVideo) -> list[dict[str, Any]]:
    """A row a frame: {"video", "frame", "J": {model: to the truth}, "to_float": {model: to the float model's masks}}.

    Means over objects, in percent. `J` is None where a frame is not annotated; the first, which is given, is left out.
    """
    rows = []
    for index in range(1, clip.length):
        truth, reference = clip.truth(index), clip.at("float", index)
        rows.append(
            {
                "video": clip.video.name,
                "frame": index,
                "J": {model: _mean_j(clip.at(model, index), truth) for model in clip.masks} if truth else None,
                "to_float": {
                    model: _mean_j(clip.at(model, index), reference) for model in clip.masks if model != "float"
                },
            }
        )
    return rows


def worst_frames(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The frames of lowest J of the quantized model to the float model's masks; of a float run to the truth.

    Those of a video are at least `APART` frames apart.
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
    """A frame four times, two by two, uint8 (H, W, 3) of even size: truth, float, quantized, their difference.

    Of a float run: the frame, truth, float, the difference of these two.
    """
    frame, truth = clip.video.frame(index), clip.truth(index)
    true = overlay(frame, list(truth.values()) if truth else [])
    theirs = clip.at("float", index)
    cells = [("truth" if truth else "truth: not annotated", true), ("float", overlay(frame, list(theirs.values())))]
    if "quantized" in clip.masks:
        ours = clip.at("quantized", index)
        cells += [
            ("quantized", overlay(frame, list(ours.values()))),
            ("quantized against float", difference(frame, theirs, ours)),
        ]
    else:
        cells = [("frame", frame), *cells, ("float against truth", difference(frame, truth or theirs, theirs))]
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
    """A pale grey frame with the pixels in colour on which the masks of the same objects, {id: bool (H, W)}, differ.

    `LOST` and `GAINED` are those of an object on one side alone, `CONFUSED` those of different objects.
    """
    grey = frame.mean(axis=2, keepdims=True).repeat(3, axis=2)
    drawn = (0.4 * grey + 0.6 * 255).astype(np.uint8)
    theirs, ours = _union(reference), _union(masks)
    drawn[_union({item: masks[item] ^ reference[item] for item in masks})] = CONFUSED
    drawn[theirs & ~ours] = LOST
    drawn[ours & ~theirs] = GAINED
    return drawn


def _keep_clip(run: Path, name: str, clip: TrackedVideo) -> dict[str, Any]:
    count = min(clip.length, MAX_FRAMES)
    frames: Iterator[np.ndarray] = (panels(clip, index) for index in range(count))
    save_media(run, f"{name}.mp4", encode_video(frames))
    save_media(run, f"{name}.jpg", _jpeg(panels(clip, count // 2)))
    return {
        "video": clip.video.name,
        "file": name,
        "frames": count,
        "of": clip.length,
        "frames_per_second": FRAMES_PER_SECOND,
        "objects": len(clip.masks["float"]),
    }


def _mean_j(masks: Mapping[int, np.ndarray], reference: Mapping[int, np.ndarray]) -> float:
    scores = [region_similarity(masks[item][None], reference[item][None])[0] for item in masks]
    return float(100 * np.mean(scores))


def _union(masks: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.logical_or.reduce(list(masks.values()))


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
