"""Clips and worst frames: what they show, which frames are chosen, what happens on a full disk."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from kept_run import SIZE, Squares, square, tracked

from qsam2.errors import UserError
from qsam2.report.overlays import TrackedVideo, write_video
from qsam2.report.tracked_clips import (
    CONFUSED,
    GAINED,
    LOST,
    difference,
    frame_scores,
    panels,
    save_clips,
    worst_frames,
)

VIDEO = Squares()
MODELS = tracked(VIDEO, "float", "ptq", "quantized")


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return 100 * (first & second).sum() / (first | second).sum()


def clip(models: dict = MODELS, frames: int | None = None) -> TrackedVideo:
    found = TrackedVideo.of(VIDEO, models, frames)
    assert found is not None
    return found


def test_each_frame_is_scored_against_truth_and_float() -> None:
    rows = frame_scores(clip())
    assert [row["frame"] for row in rows] == list(range(1, 8))
    for row in rows:
        truth = VIDEO.masks(row["frame"])[1]
        moved = {model: np.roll(truth, 2 * late, axis=1) for late, model in enumerate(MODELS)}
        assert row["J"] == {model: pytest.approx(iou(mask, truth)) for model, mask in moved.items()}
        assert row["to_float"] == {model: pytest.approx(iou(moved[model], truth)) for model in ("ptq", "quantized")}


def test_the_worst_frames_are_those_that_differ_most_from_float() -> None:
    models = {name: dict(found) for name, found in MODELS.items()}
    masks = np.stack([square(10, 4 + 4 * index) for index in range(8)])
    masks[5] = square(30, 0)  # elsewhere
    models["quantized"]["squares", 1] = np.packbits(masks)
    worst = worst_frames(frame_scores(clip(models)))
    assert [row["frame"] for row in worst] == [5] and worst[0]["to_float"]["quantized"] == 0


def test_of_neighbours_only_the_worst_is_shown() -> None:
    def row(video: str, frame: int, agreement: float) -> dict[str, Any]:
        return {"video": video, "frame": frame, "J": None, "to_float": {"quantized": agreement}}

    rows = [row("a", frame, float(abs(frame - 20))) for frame in range(60)] + [row("b", 21, 0.5), row("b", 26, 50.0)]
    worst = [(row["video"], row["frame"]) for row in worst_frames(rows)]
    assert worst == [("a", 20), ("b", 21), ("a", 15), ("a", 25), ("a", 10)]


def test_of_a_float_run_they_are_those_that_differ_most_from_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = frame_scores(clip({"float": MODELS["ptq"]}))
    assert {row["frame"] for row in worst_frames(rows)} <= set(range(1, 8)) and rows[0]["to_float"] == {}
    monkeypatch.setattr(Squares, "masks", lambda self, index: None)  # not annotated
    rows = frame_scores(clip({"float": MODELS["ptq"]}))
    assert rows[0]["J"] is None and worst_frames(rows) == []


def test_the_first_frames_only() -> None:
    assert clip(frames=3).length == 3 and clip(frames=30).length == 8
    assert TrackedVideo.of(Squares("other"), MODELS, None) is None


def test_pixels_of_one_mask_alone_are_coloured() -> None:
    frame = np.full((*SIZE, 3), 100, np.uint8)
    drawn = difference(frame, {1: square(10, 10)}, {1: square(10, 14)})
    assert (drawn[20, 11] == LOST).all() and (drawn[20, 28] == GAINED).all()
    assert len(set(map(tuple, drawn.reshape(-1, 3)))) == 3
    assert (drawn[20, 20] == drawn[0, 0]).all() and drawn[0, 0].min() > 150


def test_pixels_that_went_to_another_object_are_coloured() -> None:
    frame = np.full((*SIZE, 3), 100, np.uint8)
    first, second, nothing = square(2, 2), square(30, 30), np.zeros(SIZE, bool)
    swapped = difference(frame, {1: first, 2: second}, {1: second, 2: first})
    assert ((swapped == CONFUSED).all(axis=2) == (first | second)).all()
    taken = difference(frame, {1: first, 2: second}, {1: first | second, 2: nothing})
    assert ((taken == CONFUSED).all(axis=2) == second).all()
    both = difference(frame, {1: first, 2: nothing}, {1: first, 2: first})
    assert ((both == CONFUSED).all(axis=2) == first).all(), "a second object claims what the first one has"


@pytest.mark.parametrize("models", [MODELS, {"float": MODELS["ptq"]}])
def test_panels_are_of_even_size_with_the_difference_last(models: dict) -> None:
    sheet = panels(clip(models), 3)
    height, width = sheet.shape[:2]
    assert height % 2 == width % 2 == 0 and sheet.dtype == np.uint8
    last = sheet[height // 2 :, width // 2 :].reshape(-1, 3).astype(int)
    assert any(np.abs(last - colour).sum(axis=1).min() < 12 for colour in (LOST, GAINED))


def test_a_film_holds_the_frames_in_their_order() -> None:
    frames = [np.full((32, 48, 3), 20 * index, np.uint8) for index in range(9)]
    written = io.BytesIO()
    write_video(written, frames, frames_per_second=5)
    with av.open(io.BytesIO(written.getvalue())) as film:
        decoded = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 5
    assert [abs(float(picture.mean()) - 20 * index) < 6 for index, picture in enumerate(decoded)] == [True] * 9


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsam2.report.tracked_clips.MAX_FRAMES", 4)
    videos = [Squares(f"v{index}") for index in range(4)]
    models = {name: {} for name in MODELS}
    for video in videos:
        for name, found in tracked(video, *MODELS).items():
            models[name] |= found
    save_clips(tmp_path, videos, models, None)
    kept = json.loads((tmp_path / "report" / "clips.json").read_text())
    assert [row["video"] for row in kept["clips"]] == ["v0", "v1", "v2"] and kept["models"] == list(MODELS)
    assert {(row["frames"], row["of"], row["objects"]) for row in kept["clips"]} == {(4, 8, 1)}
    files = {file.name for file in (tmp_path / "report").iterdir()}
    pictures = {row["picture"] for row in kept["worst"]}
    assert len(kept["worst"]) == len(pictures) == 5
    assert files == {"clips.json", *pictures, *(f"clip{i}.{kind}" for i in range(3) for kind in ("mp4", "jpg"))}


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, data: bytes) -> int:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="clip0.mp4 could not be written: No space left on device; make room") as error:
        save_clips(tmp_path, [VIDEO], MODELS, None)
    assert "\n" not in str(error.value) and list((tmp_path / "report").iterdir()) == []
