"""Tracked clips of a run's page, saved in its folder.

The first videos become films of four panels (truth, float, quantized, their difference). Of all videos, the frames on
which the quantized model agrees least with the float model become pictures of the same panels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qsam2.data.video import Predictions, Video
from qsam2.evaluation.metrics.jf import region_similarity
from qsam2.output import write_bytes, write_text
from qsam2.report.overlays import TrackedVideo, overlay, write_video
from qsam2.report.read import CLIPS, FOLDER

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
PANEL_PX, LABEL_PX = 320, 20
LOST, GAINED, CONFUSED = (213, 94, 0), (86, 180, 233), (204, 121, 167)
"""Colours of the difference: pixels of the reference alone, of the model alone, and of another object."""


def save_clips(run: Path, videos: Sequence[Video], tracked: Mapping[str, Predictions], frames: int | None) -> None:
    """Write films of the first videos, the worst frames of all, and `clips.json` that lists them into the run folder.

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
        write_bytes(run / FOLDER / row["picture"], _jpeg(panels(clip, row["frame"])))
    clips = {"models": list(tracked), "clips": shown, "worst": worst}
    write_text(run / FOLDER / CLIPS, json.dumps(clips))


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


def _keep_clip(run: Path, name: str, clip: TrackedVideo) -> dict[str, Any]:
    count = min(clip.length, MAX_FRAMES)
    film = io.BytesIO()
    frames = (panels(clip, index) for index in range(count))
    write_video(film, frames, frames_per_second=FRAMES_PER_SECOND, **FILM)
    write_bytes(run / FOLDER / f"{name}.mp4", film.getvalue())
    write_bytes(run / FOLDER / f"{name}.jpg", _jpeg(panels(clip, count // 2)))
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
