"""Masks drawn over frames: which pixels are tinted, and what stands where on a contact sheet."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qsam2.data.video import Video
from qsam2.report.overlays import COLOURS, COLUMN_PX, LABEL_PX, MARGIN_PX, contact_sheet, overlay

SIZE = (60, 80)
GREY = 100


class Squares(Video):
    """Grey frames; object 1 moves to the right, object 2 is gone after frame 0."""

    name, size = "squares", SIZE

    def __init__(self, length: int) -> None:
        self.frame_names = [str(index) for index in range(length)]

    def frame(self, index: int) -> np.ndarray:
        return np.full((*SIZE, 3), GREY, np.uint8)

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        if index % 2:
            return None  # annotated every other frame
        return {1: box(10, 10 + 4 * index)} | ({2: box(35, 50)} if index == 0 else {})


def box(top: int, left: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + 16, left : left + 16] = True
    return mask


def packed(frames: list[np.ndarray]) -> np.ndarray:
    return np.packbits(np.stack(frames))


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    """The picture of a cell at the video's size, without its label."""
    height = COLUMN_PX * SIZE[0] // SIZE[1]
    left, top = column * (COLUMN_PX + MARGIN_PX), row * (LABEL_PX + height + MARGIN_PX) + LABEL_PX
    picture = sheet.crop((left, top, left + COLUMN_PX, top + height))
    return np.array(picture.resize(SIZE[::-1], Image.Resampling.BOX)).astype(int)


def tinted(picture: np.ndarray) -> np.ndarray:
    return np.abs(picture - GREY).max(axis=2) > 30


def test_pixels_are_tinted_where_the_mask_is() -> None:
    frame, mask = np.full((*SIZE, 3), GREY, np.uint8), box(10, 10)
    drawn = overlay(frame, [mask])
    np.testing.assert_array_equal(drawn[~mask], frame[~mask])
    inner = drawn[12:24, 12:24].reshape(-1, 3)
    assert (inner == [round((GREY + value) / 2) for value in COLOURS[0]]).all()
    assert (drawn[10, 10:26] == COLOURS[0]).all()  # the outline
    assert (frame == GREY).all() and drawn.dtype == np.uint8


def test_each_object_has_its_colour_also_where_it_lies_over_another() -> None:
    frame, first, second = np.zeros((*SIZE, 3), np.uint8), box(10, 10), box(18, 18)
    drawn = overlay(frame, [first, second, np.zeros(SIZE, bool)]).astype(float)
    np.testing.assert_allclose(drawn[12, 12], np.array(COLOURS[0]) / 2, atol=0.5)
    np.testing.assert_allclose(drawn[30, 30], np.array(COLOURS[1]) / 2, atol=0.5)
    np.testing.assert_allclose(drawn[22, 22], np.array(COLOURS[0]) / 4 + np.array(COLOURS[1]) / 2, atol=0.5)


def test_more_objects_than_colours() -> None:
    masks = [box(2, 2)] * (len(COLOURS) + 1)
    assert overlay(np.zeros((*SIZE, 3), np.uint8), masks).shape == (*SIZE, 3)


def test_no_mask_leaves_the_frame() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(overlay(frame, []), frame)


def test_a_sheet_has_a_row_for_the_truth_and_for_each_model() -> None:
    video, length = Squares(7), 7
    nothing = np.zeros(SIZE, bool)
    right = {("squares", 1): [box(10, 10 + 4 * i) for i in range(length)], ("squares", 2): [box(35, 50)] * length}
    wrong = {("squares", 1): [nothing] * length, ("squares", 2): [box(40, 5)] * length}
    models = {"float": right, "ptq": wrong, "quantized": right}
    predictions = {
        name: {key: packed(frames) for key, frames in tracked.items()} | {("other", 9): packed([nothing])}
        for name, tracked in models.items()
    }
    sheet = contact_sheet(video, predictions, frames=length)
    height = LABEL_PX + COLUMN_PX * SIZE[0] // SIZE[1]
    assert sheet.size == (4 * (COLUMN_PX + MARGIN_PX) - MARGIN_PX, 4 * (height + MARGIN_PX) - MARGIN_PX)
    for column, index in enumerate((0, 2, 4, 6)):
        truth = video.masks(index)
        expected = [sum(truth.values()), *(sum(models[name][key][index] for key in right) for name in models)]
        for row, masks in enumerate(expected):
            found = tinted(cell(sheet, row, column))
            assert (found != masks.astype(bool)).mean() < 0.03, (row, column)


def test_frames_without_annotation_and_short_videos() -> None:
    for length in (1, 2):
        tracked = {("squares", 1): packed([box(10, 10)] * length)}
        sheet = contact_sheet(Squares(7), {"float": tracked}, frames=length)
        assert sheet.width == length * (COLUMN_PX + MARGIN_PX) - MARGIN_PX
    assert not tinted(cell(sheet, 0, 1)).any() and tinted(cell(sheet, 1, 1)).any()  # frame 1 has no true masks


def test_labels_are_written_and_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Squares, "name", "squares" * 20)
    tracked = {(Squares.name, 1): packed([box(10, 10)] * 3)}
    sheet = np.array(contact_sheet(Squares(3), {"float": tracked}, frames=3, columns=2).convert("L"))
    labels = sheet[: LABEL_PX - 1]
    assert labels[:, :COLUMN_PX].min() < 100
    assert labels[:, COLUMN_PX : COLUMN_PX + MARGIN_PX].min() == 255  # a long name ends with its cell
    assert labels[:, COLUMN_PX + MARGIN_PX :].min() < 100
