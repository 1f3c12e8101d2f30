"""Meaning of the greys of masks: decided once for all files of a video or folder; what cannot be told is refused."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from messages import Message
from PIL import Image
from small_datasets import box, save

from qsam2.data.index_masks import MaskFiles, read_ids
from qsam2.data.pictures import list_pictures
from qsam2.data.stills import instance_png_stills
from qsam2.data.video_datasets import davis_videos, sav_videos
from qsam2.errors import UserError
from qsam2.predict.parse import read_prompts

SIZE = (60, 90)
MASK = box(SIZE, 20, 30, 25, 31)
WHITE = MASK * np.uint8(255)
GREY_PALETTE = [grey for index in range(256) for grey in (index, index, index)]
ALPHA = np.where(MASK, 255, 0).astype(np.uint8)


def jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    def again(white: np.ndarray) -> np.ndarray:
        stream = io.BytesIO()
        Image.fromarray(white).save(stream, "JPEG", quality=quality)
        return np.array(Image.open(stream))

    return again


def resized(side: float, how: int) -> Callable[[np.ndarray], np.ndarray]:
    """Made smaller or larger, and back."""

    def again(white: np.ndarray) -> np.ndarray:
        other = cv2.resize(white, None, fx=side, fy=side, interpolation=how)
        return cv2.resize(other, white.shape[::-1], interpolation=cv2.INTER_LINEAR)

    return again


def edge_of_one_grey(white: np.ndarray) -> np.ndarray:
    edge = cv2.dilate(white, np.ones((3, 3), np.uint8)) > white
    return np.where(edge, 127, white).astype(np.uint8)


def specks(white: np.ndarray) -> np.ndarray:
    """Dim ones in the black, each alone, and bright ones in the white."""
    specked = white.copy()
    specked[2::4, 2::4] = np.where(white[2::4, 2::4], 250, 5)
    return specked


SOFTENED = {
    "blur 3": lambda white: cv2.GaussianBlur(white, (3, 3), 0),
    "blur 15": lambda white: cv2.GaussianBlur(white, (15, 15), 0),
    "16 bits": lambda white: cv2.GaussianBlur(white, (5, 5), 0).astype(np.uint16) * 257,
    "jpeg 40": jpeg(40),
    "jpeg 90": jpeg(90),
    "jpeg 100": jpeg(100),
    "smaller": resized(0.37, cv2.INTER_LINEAR),
    "larger": resized(2, cv2.INTER_CUBIC),
    "edge": edge_of_one_grey,
    "specks": specks,
    "colours": lambda white: np.dstack([cv2.GaussianBlur(white, (5, 5), 0)] * 3),
}


def video(root: Path, masks: list[np.ndarray], modes: tuple[str | None, ...] = (None,)) -> Path:
    for index, mask in enumerate(masks):
        save(root / f"JPEGImages/v/{index:05d}.jpg", np.zeros((*SIZE, 3), np.uint8))
        save(root / f"Annotations/v/{index:05d}.png", mask, modes[index % len(modes)])
    return root


@pytest.mark.parametrize("how", SOFTENED)
def test_a_mask_with_soft_edges_is_one_object(tmp_path: Path, how: str) -> None:
    masks = [SOFTENED[how](np.roll(WHITE, 4 * shift, axis=1)) for shift in range(3)]
    (made,) = davis_videos(video(tmp_path, [*masks, np.zeros_like(masks[0])]), "all")
    half = 32768 if masks[0].dtype == np.uint16 else 128
    assert len(np.unique(masks[0])) > 2
    for index in range(3):
        (found,) = made.masks(index).values()
        true = np.roll(MASK, 4 * index, axis=1)
        np.testing.assert_array_equal(found, (masks[index] if masks[0].ndim == 2 else masks[index][..., 0]) >= half)
        assert list(made.masks(index)) == [1] and (found & true).sum() / (found | true).sum() > 0.85
    assert made.masks(3) == {}


def test_the_void_border_is_never_an_object(tmp_path: Path) -> None:
    """A frame that the object has left holds 0 and 255 alone, as another program may write in one bit."""
    border = np.zeros(SIZE, np.uint8)
    border[:5] = 255
    with_object = np.where(MASK, np.uint8(1), border)
    masks = [with_object, border, border > 0, with_object, border.astype(np.uint16)]
    (made,) = davis_videos(video(tmp_path, masks), "all")
    assert [list(made.masks(index)) for index in range(5)] == [[1], [], [], [1], []]
    np.testing.assert_array_equal(made.masks(0)[1], MASK)


def palette(indices: np.ndarray, colours: list[int]) -> Image.Image:
    picture = Image.fromarray(indices.astype(np.uint8), "P")
    picture.putpalette(colours)
    return picture


ONE_OBJECT = {
    "grey": Image.fromarray(WHITE),
    "nearly white": Image.fromarray(MASK * np.uint8(254)),
    "one bit": Image.fromarray(MASK),
    "16 bits": Image.fromarray(MASK * np.uint16(65535)),
    "255 in 16 bits": Image.fromarray(MASK * np.uint16(255)),
    "colour": Image.fromarray(np.dstack([WHITE] * 3)),
    "opaque": Image.fromarray(np.dstack([WHITE] * 3 + [np.full(SIZE, 255, np.uint8)])),
    "grey and opaque": Image.fromarray(np.dstack([WHITE, np.full(SIZE, 255, np.uint8)]), "LA"),
    "palette of greys": palette(WHITE, GREY_PALETTE),
    "palette white first": palette(~MASK, [255, 255, 255, 0, 0, 0]),
    "palette of ids": palette(MASK, [0, 0, 0, 128, 0, 0]),
    "palette of ids, white": palette(MASK, [0, 0, 0, 255, 255, 255]),
    "palette of ids, white void": palette(MASK + box(SIZE, 0, 0, 5, 90) * np.uint8(255), [0] * 3 + [255] * 765),
}


@pytest.mark.parametrize("kind", ONE_OBJECT)
def test_one_object_however_it_is_written(tmp_path: Path, kind: str) -> None:
    ONE_OBJECT[kind].save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_ids(tmp_path / "mask.png", SIZE), MASK)


def many(side: int) -> np.ndarray:
    """Two hundred objects, most of them no larger than `side`."""
    ids = np.zeros((240, 320), np.uint8)
    rng = np.random.default_rng(0)
    for number in range(1, 201):
        (top, left), (height, width) = rng.integers(0, (240 - side, 320 - side)), rng.integers(1, side + 1, 2)
        ids[top : top + height, left : left + width] = number
    return ids


def nested() -> np.ndarray:
    """Rings of ids that rise inwards, as a soft edge does, but three pixels wide."""
    ids = np.zeros(SIZE, np.uint8)
    for ring, number in enumerate((80, 120, 160, 200)):
        ids[10 + 3 * ring : 50 - 3 * ring, 30 + 3 * ring : 70 - 3 * ring] = number
    return ids


@pytest.mark.parametrize(
    ("ids", "void"),
    [
        (nested(), 255),
        *((many(side), 255) for side in (2, 4, 12)),
        (many(4).astype(np.uint16) * 300, 65535),
        (MASK * np.uint8(5), 255),
        (MASK * np.uint8(128), 255),
        (box(SIZE, 20, 30, 1, 9) * np.uint8(1), 255),
        (MASK * np.uint8(2) + box(SIZE, 22, 33, 9, 9) * np.uint8(1), 255),
    ],
)
def test_ids_stay_ids(tmp_path: Path, ids: np.ndarray, void: int) -> None:
    np.testing.assert_array_equal(read_ids(save(tmp_path / "ids.png", ids)), ids)
    if ids[ids > 0].min() >= 64:
        return  # beside white this is refused
    edged = ids.copy()
    edged[:3] = void
    small = (ids > 0).sum() < 20  # too little to be told from the edge of a white object
    if not small:
        np.testing.assert_array_equal(read_ids(save(tmp_path / "edged.png", edged)), np.where(edged == void, 0, edged))


def test_files_between_the_first_ones_decide_too_and_damaged_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsam2.data.index_masks._PROBED", 2)
    border = np.zeros(SIZE, np.uint8)
    border[:5] = 255
    paths = [save(tmp_path / f"{index}.png", border + MASK * np.uint8(index > 1)) for index in range(4)]
    assert not MaskFiles(paths).read(paths[0]).any(), "the third file has the id 1, so 255 is void"
    paths[0].write_bytes(b"damaged")
    np.testing.assert_array_equal(MaskFiles(paths).read(paths[2]), MASK)


def test_palettes_and_greys_of_one_value_differ_in_what_255_is(tmp_path: Path) -> None:
    void = palette(WHITE, [0, 0, 0] * 255 + [224, 224, 192])  # DAVIS's colour of void
    void.save(tmp_path / "void.png")
    assert not read_ids(tmp_path / "void.png").any()


@pytest.mark.parametrize("suffix", ["bmp", "tif", "webp"])
def test_masks_in_other_formats_do_not_vanish(tmp_path: Path, suffix: str) -> None:
    video(tmp_path, [WHITE, WHITE])
    with Image.open(tmp_path / "Annotations/v/00001.png") as picture:
        picture.save(tmp_path / f"Annotations/v/00001.{suffix}", lossless=True)
    (tmp_path / "Annotations/v/00001.png").unlink()
    (made,) = davis_videos(tmp_path, "all")
    np.testing.assert_array_equal(made.masks(1)[1], MASK)


def test_object_folders_and_stills_take_soft_masks(tmp_path: Path) -> None:
    soft = cv2.GaussianBlur(WHITE, (5, 5), 0)
    for index in range(2):
        save(tmp_path / f"sav/sav_val/JPEGImages_24fps/v/{index:05d}.jpg", np.zeros((*SIZE, 3), np.uint8))
        save(tmp_path / f"sav/sav_val/Annotations_6fps/v/000/{index:05d}.jpg", WHITE)
        save(tmp_path / f"sav/sav_val/Annotations_6fps/v/001/{index:05d}.png", soft)
    save(tmp_path / "sav/sav_val/sav_val.txt", "v")
    (made,) = sav_videos(tmp_path / "sav", "val")
    np.testing.assert_array_equal(made.masks(1)[1], MASK)
    np.testing.assert_array_equal(made.masks(1)[2], soft >= 128)
    for name, mask in (("a", soft), ("b", np.roll(soft, 5))):
        save(tmp_path / f"images/{name}.jpg", np.zeros((*SIZE, 3), np.uint8))
        save(tmp_path / f"instance_png/{name}.png", mask)
    for still, true in zip(instance_png_stills(tmp_path), (soft, np.roll(soft, 5)), strict=True):
        assert list(still.masks(0)) == [1]
        np.testing.assert_array_equal(still.masks(0)[1], true >= 128)
    prompts = read_prompts([("mask", str(tmp_path / "instance_png/a.png"))], made)
    assert list(prompts) == [1]
    np.testing.assert_array_equal(prompts[1][0].mask, soft >= 128)


@pytest.mark.parametrize(("worker", "lines"), [(None, 1), (0, 1), (1, 0)])
def test_of_loader_workers_the_first_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, worker: int | None, lines: int
) -> None:
    caplog.set_level(logging.INFO)
    info = None if worker is None else SimpleNamespace(id=worker)
    monkeypatch.setattr("qsam2.data.index_masks.get_worker_info", lambda: info)
    read_ids(save(tmp_path / "mask.png", WHITE))
    assert len(caplog.messages) == lines


def test_what_is_decided_is_logged_once_for_a_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    border = np.where(MASK, np.uint8(1), np.uint8(255))
    kinds = {"ids": MASK * np.uint8(1), "void": border, "white": WHITE, "soft": cv2.GaussianBlur(WHITE, (5, 5), 0)}
    for kind, mask in kinds.items():
        for name in ("a", "b"):
            save(tmp_path / f"{kind}/JPEGImages/{name}/0.jpg", np.zeros((*SIZE, 3), np.uint8))
            save(tmp_path / f"{kind}/Annotations/{name}/0.png", mask)
        for made in davis_videos(tmp_path / kind, "all"):
            made.masks(0)
    assert [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records] == [
        "ids/Annotations: the greys of masks are object ids (a, ...)",
        "void/Annotations: the greys of masks are object ids, and 255 is void (a, ...)",
        "white/Annotations: the masks are black and white: each shows one object, the white one (a, ...)",
        "soft/Annotations: the masks are grey with soft edges: each shows one object, from 128 of 255 on (a, ...)",
    ]


REFUSED: dict[str, list[Image.Image | np.ndarray]] = {
    "colours": [np.dstack([WHITE, WHITE * 0, WHITE * 0])],
    "alpha": [np.dstack([WHITE * 0] * 3 + [ALPHA])],
    "grey and alpha": [Image.fromarray(np.dstack([WHITE, ALPHA]), "LA")],
    "white or void": [np.where(MASK, np.uint8(128), WHITE[::-1])],
    "soft and ids": [cv2.GaussianBlur(WHITE, (5, 5), 0), MASK * np.uint8(2)],
    "black is not 0": [palette(~MASK + 2 * box(SIZE, 0, 0, 9, 9), [255, 0, 0, 0, 0, 0, 0, 0, 255])],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_is_refused(tmp_path: Path, kind: str, message: Message) -> None:
    for index, picture in enumerate(REFUSED[kind]):
        picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        picture.save(tmp_path / f"{index}.png")
    with pytest.raises(UserError) as caught:
        MaskFiles(list_pictures(tmp_path)).read(tmp_path / "0.png")
    assert str(tmp_path) in message(caught)


@pytest.mark.parametrize(
    ("name", "values", "fact"),
    [
        ("a.jpg", MASK * np.uint8(20), "JPEG"),
        ("a.tif", MASK.astype(np.float32), "this one is F"),
        ("a.tif", MASK.astype(np.int32) * -1, "this one is I"),
        ("a.tif", MASK.astype(np.int32) * 70_000, "this one is I"),
        ("a.JPEG", MASK * np.uint8(20), "JPEG"),
    ],
)
def test_files_that_cannot_hold_ids_are_refused(
    tmp_path: Path, name: str, values: np.ndarray, fact: str, message: Message
) -> None:
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(UserError) as caught:
        read_ids(tmp_path / name)
    assert fact in message(caught)


def test_a_mask_is_turned_as_its_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(MASK * np.uint8(3)).copy()).save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(read_ids(tmp_path / "mask.png", SIZE), MASK * 3)
