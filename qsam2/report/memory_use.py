"""Memory use over a video: which remembered frames each frame reads when similar frames share keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsam2.data.video import Video
from qsam2.evaluation.tracking import first_masks, track
from qsam2.memory.bank import Bank
from qsam2.memory.reader import MemoryReader
from qsam2.memory.sharing import KeySet
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe
from qsam2.report.draw import BLUE, GREY, ORANGE, inline, new_figure

READINGS = {
    "own keys": (BLUE, "o", 22),
    "shared keys": (ORANGE, "s", 22),
    "part of its keys": (ORANGE, "^", 22),
    "not read": (GREY, "x", 16),
}


def memory_use(model: SAM2, video: Video, evaluation: EvaluateRecipe) -> dict[str, Any]:
    """Track a video and record what its first object reads of the memory bank, as the recipe configures it.

    {"video", "frames": [{"frame", "read": {remembered frame: one of `READINGS`}, "key_frames": number of keys read, in
    frames, "of": number of keys in the bank, in frames}]}. Prompted frames count in the last two only.
    """
    length = min(len(video), evaluation.frames or len(video))
    prompts = first_masks(video, length, later_objects=False)
    start, masks = next(iter(prompts.items()))
    first = {start: dict(list(masks.items())[:1])}
    rows: list[dict[str, Any]] = []
    reader = model.memory_reader
    assert isinstance(reader, MemoryReader)
    reader.watch = lambda frame, bank, sets: rows.append(_row(frame, bank, sets))
    try:
        track(model, video, first, length=length, non_overlapping=False)
    finally:
        reader.watch = None
    return {"video": video.name, "frames": rows}


def draw_memory(used: Mapping[str, Any]) -> str:
    """Age of the remembered frames and number of keys read, over the frames of the video, as SVG."""
    rows = used["frames"]
    figure = new_figure(8, 4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for reading, (colour, marker, size) in READINGS.items():
        at = [(row["frame"], row["frame"] - int(time)) for row in rows for time, kind in row["read"].items()
              if kind == reading]  # fmt: skip
        if at:
            upper.scatter(*zip(*at, strict=True), color=colour, marker=marker, s=size, label=reading, linewidths=0.8)
    upper.set_ylabel("age of the remembered frame")
    upper.legend(frameon=False, fontsize=8, loc="upper left", ncols=4, bbox_to_anchor=(0, 1.16))
    frames = [row["frame"] for row in rows]
    lower.step(frames, [row["of"] for row in rows], color=GREY, linestyle="--", where="mid", label="all")
    lower.step(frames, [row["key_frames"] for row in rows], color=BLUE, where="mid", label="read")
    lower.set(xlabel="frame", ylabel="frames of keys", ylim=(0, None))
    lower.legend(frameon=False, fontsize=8, loc="lower right")
    read, whole = sum(row["key_frames"] for row in rows), sum(row["of"] for row in rows)
    count = {name: sum(kind == name for row in rows for kind in row["read"].values()) for name in READINGS}
    named = ", ".join(f"{value} {name}" for name, value in count.items() if value)
    return inline(figure, f"Memory of {len(rows)} tracked frames: {read:.0f} of {whole} frames of keys were read; "
                          f"remembered frames: {named}")  # fmt: skip


def _row(frame: int, bank: Bank, sets: list[KeySet]) -> dict[str, Any]:
    prompted = {memory.time for memory in bank.conditioning}
    read: dict[int, str] = {}
    key_frames = 0.0
    for keys in sets:
        if keys.counts[0] == 0:  # another object's
            continue
        part = (keys.share or 1.0) / (keys.window[0] * keys.window[1])
        key_frames += part
        of_object = [memory.time for index, memory in enumerate(keys.frames)
                     if keys.weights is None or float(keys.weights[index, 0])]  # fmt: skip
        reading = "shared keys" if len(of_object) > 1 else "part of its keys" if part < 1 else "own keys"
        read |= {time: reading for time in of_object if time not in prompted}
    unread = {memory.time: "not read" for memory in bank.recent if memory.time not in read}
    total = len(bank.conditioning) + len(bank.recent)
    return {"frame": frame, "read": read | unread, "key_frames": key_frames, "of": total}
