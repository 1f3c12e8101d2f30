"""Masks drawn over frames: tinted pixels, contact sheets, films, and a run's tracked clips with their worst frames."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from kept_run import SIZE, Squares, fill_disk, square, tracked
from PIL import Image

from qsam2.errors import UserError
from qsam2.report.overlays import (
    COLOURS,
    COLUMN_PX,
    CONFUSED,
    GAINED,
    LABEL_PX,
    LOST,
    MARGIN_PX,
    TrackedVideo,
    contact_sheet,
    difference,
    frame_scores,
    overlay,
    panels,
    save_clips,
    worst_frames,
    write_video,
)

GREY = 100
FRAME = np.full((*SIZE, 3), GREY, np.uint8)
NOTHING = np.zeros(SIZE, bool)
VIDEO = Squares()
MODELS = tracked(VIDEO, "float", "ptq", "quantized")


def packed(frames: list[np.ndarray]) -> np.ndarray:
    return np.packbits(np.stack(frames))


def clip(models: dict = MODELS, frames: int | None = None) -> TrackedVideo:
    found = TrackedVideo.of(VIDEO, models, frames)
    assert found is not None
    return found


def test_pixels_are_tinted_and_outlined_where_the_mask_is() -> None:
    frame, mask = FRAME.copy(), square(10, 10)
    drawn = overlay(frame, [mask])
    np.testing.assert_array_equal(drawn[~mask], frame[~mask])
    assert (drawn[12:24, 12:24] == [round((GREY + value) / 2) for value in COLOURS[0]]).all()
    assert (drawn[10, 10:26] == COLOURS[0]).all()  # the outline
    assert (frame == GREY).all() and drawn.dtype == np.uint8
    np.testing.assert_array_equal(overlay(frame, []), frame)


def test_each_object_has_its_colour_also_where_it_lies_over_another() -> None:
    frame, first, second = np.zeros((*SIZE, 3), np.uint8), square(10, 10), square(18, 18)
    drawn = overlay(frame, [first, second, NOTHING]).astype(float)
    np.testing.assert_allclose(drawn[12, 12], np.array(COLOURS[0]) / 2, atol=0.5)
    np.testing.assert_allclose(drawn[30, 30], np.array(COLOURS[1]) / 2, atol=0.5)
    np.testing.assert_allclose(drawn[22, 22], np.array(COLOURS[0]) / 4 + np.array(COLOURS[1]) / 2, atol=0.5)
    again = overlay(frame, [NOTHING] * len(COLOURS) + [first])  # more objects than colours
    assert (again[10, 10:26] == COLOURS[0]).all()


# Contact sheets


class TwoSquares(Squares):
    """Annotated every other frame; object 2 is gone after frame 0."""

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        return None if index % 2 else super().masks(index) | ({2: square(30, 46)} if index == 0 else {})


def tinted(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    """Pixels that differ from grey in a cell, at the video's size and without its label."""
    height = COLUMN_PX * SIZE[0] // SIZE[1]
    left, top = column * (COLUMN_PX + MARGIN_PX), row * (LABEL_PX + height + MARGIN_PX) + LABEL_PX
    picture = sheet.crop((left, top, left + COLUMN_PX, top + height)).resize(SIZE[::-1], Image.Resampling.BOX)
    return np.abs(np.array(picture).astype(int) - GREY).max(axis=2) > 30


def test_a_sheet_has_a_row_for_the_truth_and_for_each_model() -> None:
    video = TwoSquares(length=7)
    right = {1: [square(10, 4 + 4 * index) for index in range(7)], 2: [square(30, 46)] * 7}
    models = {"float": right, "ptq": {1: [NOTHING] * 7, 2: [square(30, 5)] * 7}, "quantized": right}
    predictions = {
        name: {(video.name, item): packed(frames) for item, frames in masks.items()} | {("other", 9): packed([NOTHING])}
        for name, masks in models.items()
    }
    sheet = contact_sheet(video, predictions)
    height = LABEL_PX + COLUMN_PX * SIZE[0] // SIZE[1]
    assert sheet.size == (4 * (COLUMN_PX + MARGIN_PX) - MARGIN_PX, 4 * (height + MARGIN_PX) - MARGIN_PX)
    for column, index in enumerate((0, 2, 4, 6)):
        truth = video.masks(index)
        expected = [sum(truth.values()), *(sum(masks[item][index] for item in masks) for masks in models.values())]
        for row, masks in enumerate(expected):
            assert (tinted(sheet, row, column) != masks.astype(bool)).mean() < 0.04, (row, column)


def test_frames_without_annotation_and_short_videos() -> None:
    for length in (1, 2):
        models = {"float": {("squares", 1): packed([square(10, 10)] * length)}}
        sheet = contact_sheet(TwoSquares(length=7), models, frames=length)
        assert sheet.width == length * (COLUMN_PX + MARGIN_PX) - MARGIN_PX
    assert not tinted(sheet, 0, 1).any() and tinted(sheet, 1, 1).any()  # frame 1 has no true masks


def test_labels_are_written_and_clipped() -> None:
    video = Squares("squares" * 20, length=3)
    sheet = np.array(contact_sheet(video, tracked(video, "float"), columns=2).convert("L"))
    labels = sheet[: LABEL_PX - 1]
    assert labels[:, :COLUMN_PX].min() < 100
    assert labels[:, COLUMN_PX : COLUMN_PX + MARGIN_PX].min() == 255  # a long name ends with its cell
    assert labels[:, COLUMN_PX + MARGIN_PX :].min() < 100


# Tracked clips


def test_each_frame_is_scored_against_truth_and_float() -> None:
    def iou(first: np.ndarray, second: np.ndarray) -> Any:
        return pytest.approx(100 * (first & second).sum() / (first | second).sum())

    rows = frame_scores(clip())
    assert [row["frame"] for row in rows] == list(range(1, 8))
    for row in rows:
        truth = VIDEO.masks(row["frame"])[1]
        moved = {model: np.roll(truth, 2 * late, axis=1) for late, model in enumerate(MODELS)}
        assert row["J"] == {model: iou(mask, truth) for model, mask in moved.items()}
        assert row["to_float"] == {model: iou(moved[model], truth) for model in ("ptq", "quantized")}


def test_the_worst_frames_differ_most_from_float_and_of_neighbours_only_the_worst_is_shown() -> None:
    def row(video: str, frame: int, agreement: float) -> dict[str, Any]:
        return {"video": video, "frame": frame, "J": None, "to_float": {"quantized": agreement}}

    rows = [row("a", frame, float(abs(frame - 20))) for frame in range(60)] + [row("b", 21, 0.5), row("b", 26, 50.0)]
    worst = [(row["video"], row["frame"]) for row in worst_frames(rows)]
    assert worst == [("a", 20), ("b", 21), ("a", 15), ("a", 25), ("a", 10)]


def test_of_a_float_run_they_are_those_that_differ_most_from_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [VIDEO.masks(index)[1] for index in range(8)]
    models = {"float": {("squares", 1): packed([*masks[:5], square(30, 0), *masks[6:]])}}
    rows = frame_scores(clip(models))
    assert [row["frame"] for row in worst_frames(rows)] == [5] and rows[0]["to_float"] == {}
    monkeypatch.setattr(Squares, "masks", lambda self, index: None)  # not annotated
    rows = frame_scores(clip(models))
    assert rows[0]["J"] is None and worst_frames(rows) == []


def test_the_first_frames_only() -> None:
    assert clip(frames=3).length == 3 and clip(frames=30).length == 8
    assert TrackedVideo.of(Squares("other"), MODELS, None) is None


def test_differing_pixels_are_coloured() -> None:
    drawn = difference(FRAME, {1: square(10, 10)}, {1: square(10, 14)})
    assert (drawn[20, 11] == LOST).all() and (drawn[20, 28] == GAINED).all()
    assert len(set(map(tuple, drawn.reshape(-1, 3)))) == 3
    assert (drawn[20, 20] == drawn[0, 0]).all() and drawn[0, 0].min() > 150


FIRST, SECOND = square(2, 2), square(30, 30)


@pytest.mark.parametrize(
    ("reference", "masks", "confused"),
    [
        ((FIRST, SECOND), (SECOND, FIRST), FIRST | SECOND),
        ((FIRST, SECOND), (FIRST | SECOND, NOTHING), SECOND),
        ((FIRST, NOTHING), (FIRST, FIRST), FIRST),  # a second object claims what the first one has
    ],
)
def test_pixels_that_went_to_another_object_are_coloured(
    reference: tuple[np.ndarray, ...], masks: tuple[np.ndarray, ...], confused: np.ndarray
) -> None:
    drawn = difference(FRAME, dict(enumerate(reference, 1)), dict(enumerate(masks, 1)))
    assert ((drawn == CONFUSED).all(axis=2) == confused).all()


@pytest.mark.parametrize("models", [MODELS, {"float": MODELS["ptq"]}])
def test_panels_are_of_even_size_with_the_difference_last(models: dict) -> None:
    sheet = panels(clip(models), 3)
    height, width = sheet.shape[:2]
    assert height % 2 == width % 2 == 0 and sheet.dtype == np.uint8
    last = sheet[height // 2 :, width // 2 :].reshape(-1, 3).astype(int)
    assert any(np.abs(last - colour).sum(axis=1).min() < 12 for colour in (LOST, GAINED))


def test_a_film_holds_the_frames_in_their_order() -> None:
    written = io.BytesIO()
    write_video(written, [np.full((32, 48, 3), 20 * index, np.uint8) for index in range(9)], frames_per_second=5)
    with av.open(io.BytesIO(written.getvalue())) as film:
        decoded = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 5
    assert [abs(float(picture.mean()) - 20 * index) < 6 for index, picture in enumerate(decoded)] == [True] * 9


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsam2.report.overlays.MAX_FRAMES", 4)
    videos = [Squares(f"v{index}") for index in range(4)]
    predictions = [tracked(video, *MODELS) for video in videos]
    models = {name: {key: masks for found in predictions for key, masks in found[name].items()} for name in MODELS}
    kept = save_clips(tmp_path, [Squares("of another process"), *videos], models, None)
    assert [row["video"] for row in kept["clips"]] == ["v0", "v1", "v2"] and kept["models"] == list(MODELS)
    assert {(row["frames"], row["of"], row["objects"]) for row in kept["clips"]} == {(4, 8, 1)}
    pictures = {row["picture"] for row in kept["worst"]}
    assert len(kept["worst"]) == len(pictures) == 5
    films = {f"clip{index}.{kind}" for index in range(3) for kind in ("mp4", "jpg")}
    assert {file.name for file in tmp_path.iterdir()} == pictures | films


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(UserError, match="clip0.mp4 could not be written: No space left on device; make room"):
        save_clips(tmp_path, [VIDEO], MODELS, None)
    assert list(tmp_path.iterdir()) == []
