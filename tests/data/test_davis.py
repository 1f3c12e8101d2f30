"""The DAVIS-layout reader: what it reads, and the one-line error for each thing that can be wrong."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qsam2.data.davis import davis_videos
from qsam2.data.pictures import read_frame, read_index_mask
from qsam2.errors import UserError

SIZE = (24, 32)
real_data = pytest.mark.skipif("QSAM2_DATA" not in os.environ, reason="QSAM2_DATA does not name the real data's folder")


def picture(index: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture, distinct for each index."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return Image.fromarray(np.stack([rows * 5, columns * 5, np.full(size, 40 * index)], -1).astype(np.uint8))


def index_mask(ids: np.ndarray, mode: str = "P") -> Image.Image:
    mask = Image.fromarray(ids.astype(np.uint8), "L")
    if mode == "P":
        mask = Image.fromarray(ids.astype(np.uint8), "P")
        mask.putpalette([component for i in range(256) for component in (i, 255 - i, 128)])
    return mask


def two_objects(void: bool = False) -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    ids[2:8, 2:8], ids[10:20, 10:20] = 1, 2
    if void:
        ids[20:, 20:] = 255
    return ids


def write_sequence(root: Path, name: str, frames: int = 3, annotated: tuple[int, ...] = (0, 1, 2), below: str = ""):
    pictures, masks = root / "JPEGImages" / below / name, root / "Annotations" / below / name
    pictures.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(frames):
        picture(i).save(pictures / f"{i:05d}.jpg", quality=95)
    for i in annotated:
        index_mask(two_objects(void=True)).save(masks / f"{i:05d}.png")


def write_split(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    for name in ("bear", "dance"):
        write_sequence(tmp_path, name)
    write_split(tmp_path / "ImageSets" / "val.txt", "dance", "bear")
    return tmp_path


def test_frames_and_masks_are_those_of_the_files(davis):
    dance, bear = davis_videos(davis, "val")
    assert (dance.name, bear.name, len(bear), bear.size) == ("dance", "bear", 3, SIZE)
    assert bear.frame_names == ["00000", "00001", "00002"]
    np.testing.assert_array_equal(bear.frame(1), np.array(Image.open(davis / "JPEGImages/bear/00001.jpg")))
    assert bear.frame(1).dtype == np.uint8
    masks = bear.masks(0)
    assert list(masks) == [1, 2]  # 255 is void
    np.testing.assert_array_equal(masks[2], two_objects() == 2)


@pytest.mark.parametrize("folder", ["ImageSets", "ImageSets/2017", "ImageSets/2016"])
def test_the_480p_layout_of_both_years(tmp_path, folder):
    write_sequence(tmp_path, "bear", below="480p")
    write_split(tmp_path / folder / "train.txt", "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png", "")
    assert [video.name for video in davis_videos(tmp_path, "train")] == ["bear"]


def test_a_year_can_be_named_and_all_takes_every_sequence(davis):
    write_split(davis / "ImageSets" / "2016" / "val.txt", "bear")
    assert [video.name for video in davis_videos(davis, "2016/val")] == ["bear"]
    assert [video.name for video in davis_videos(davis, "all")] == ["bear", "dance"]


def test_the_layout_of_youtube_vos_and_mose_takes_all_sequences_of_the_folder(tmp_path):
    write_sequence(tmp_path / "train", "abc", frames=6, annotated=(0, 5))
    (video,) = davis_videos(tmp_path, "train")
    assert video.annotated_frames == [0, 5]
    assert video.masks(1) is None and set(video.masks(5)) == {1, 2}


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    write_sequence(tmp_path, "bear", frames=1, annotated=(0,))
    for stem in ("10", "2", "1"):
        picture().save(tmp_path / f"JPEGImages/bear/{stem}.jpg")
        index_mask(two_objects()).save(tmp_path / f"Annotations/bear/{stem}.png")
    assert davis_videos(tmp_path, "all")[0].frame_names == ["00000", "1", "2", "10"]


@pytest.mark.parametrize(
    ("values", "mode", "ids"),
    [
        ((0, 255), "L", {1}),  # DAVIS-2016
        ((0, 1, 2), "L", {1, 2}),
        ((0, 1, 255), "L", {1}),  # beside ids 255 is void
        ((0, 1, 2, 255), "P", {1, 2}),
        ((0, 255), "P", set()),  # a palette's 255 is void
        ((0,), "P", set()),
    ],
)
def test_ids_of_a_mask_file(tmp_path, values, mode, ids):
    given = np.zeros(SIZE, np.uint8)
    given[: len(values), 0] = values
    index_mask(given, mode).save(tmp_path / "mask.png")
    assert set(np.unique(read_index_mask(tmp_path / "mask.png"))) == {0} | ids


def test_one_bit_and_grey_in_colour_masks_show_one_object(tmp_path):
    object_1 = two_objects() == 1
    Image.fromarray(object_1).save(tmp_path / "bit.png")
    Image.fromarray(np.repeat(object_1[..., None] * np.uint8(255), 3, -1)).save(tmp_path / "grey.png")
    for name in ("bit.png", "grey.png"):
        np.testing.assert_array_equal(read_index_mask(tmp_path / name), object_1)


def check(message: str, action) -> None:
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_errors_at_opening(davis):
    check("has no test.txt; the splits are val, all", lambda: davis_videos(davis, "test"))
    check("nowhere: has neither JPEGImages/ nor val/JPEGImages/", lambda: davis_videos(davis / "nowhere", "val"))
    (davis / "Annotations/bear/00007.png").write_bytes((davis / "Annotations/bear/00000.png").read_bytes())
    check("bear/00007.png: is a mask without its frame", lambda: davis_videos(davis, "val"))
    (davis / "Annotations/bear/00007.png").unlink()
    write_split(davis / "ImageSets/empty.txt", "")
    check("empty.txt: lists no sequences", lambda: davis_videos(davis, "empty"))
    write_split(davis / "ImageSets/odd.txt", "bear", "horse")
    check("JPEGImages: lacks the sequence 'horse', listed in the split 'odd'", lambda: davis_videos(davis, "odd"))
    (davis / "JPEGImages/void").mkdir()
    check("JPEGImages/void: holds no frames", lambda: davis_videos(davis, "all"))
    picture().save(davis / "JPEGImages/void/00000.jpg")
    check("Annotations/void: holds no masks", lambda: davis_videos(davis, "all"))
    (davis / "train/JPEGImages").mkdir(parents=True)
    check("train/JPEGImages: holds no sequences", lambda: davis_videos(davis, "train"))


def test_errors_at_reading(davis):
    picture(size=(20, 32)).save(davis / "JPEGImages/bear/00001.jpg")
    index_mask(np.ones((24, 30))).save(davis / "Annotations/bear/00001.png")
    picture().save(davis / "Annotations/bear/00002.png")
    video = davis_videos(davis, "val")[1]
    check("JPEGImages/bear/00001.jpg: is 20x32 .* expected 24x32", lambda: video.frame(1))
    check("Annotations/bear/00001.png: is 24x30 .* expected 24x32", lambda: video.masks(1))
    check(
        "Annotations/bear/00002.png: a mask picture holds one object id .* is RGB",
        lambda: video.masks(2),
    )
    (davis / "JPEGImages/bear/00000.jpg").write_bytes(b"no picture")
    check("JPEGImages/bear/00000.jpg: cannot be read as a picture", lambda: davis_videos(davis, "val"))


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_picture_is_an_error_not_grey_pixels(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    for name, image, read in (("a.jpg", picture(), read_frame), ("a.png", index_mask(two_objects()), read_index_mask)):
        stream = io.BytesIO()
        image.save(stream, "JPEG" if name == "a.jpg" else "PNG")
        data = stream.getvalue()
        pixels_end = len(data) - 12 * (name == "a.png")  # a PNG's last chunk holds none
        (folder / name).write_bytes(data[: int(share * pixels_end)])
        check(f"{name}: cannot be read as a picture", lambda read=read, name=name: read(folder / name))


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_mask_is_an_error_or_harmless(tmp_path_factory, position, flip):
    ids = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
    stream = io.BytesIO()
    index_mask(ids).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[int(position * len(data))] ^= flip
    path = tmp_path_factory.mktemp("flip") / "mask.png"
    path.write_bytes(bytes(data))
    try:
        found = read_index_mask(path)
    except UserError:
        return
    np.testing.assert_array_equal(found, ids)


@real_data
def test_the_real_davis_2016():
    root = Path(os.environ["QSAM2_DATA"])
    train, val = davis_videos(root / "davis16_240p", "train"), davis_videos(root / "davis16_240p", "val")
    assert (len(train), len(val)) == (22, 7)
    assert not {video.name for video in train} & {video.name for video in val}
    large = {video.name: video for video in davis_videos(root / "davis16_480p", "all")}
    assert large["soccerball"].size == (480, 854) and set(large["soccerball"].masks(0)) == {1}
    for video in val:
        assert video.annotated_frames == list(range(len(video)))
        assert video.masks(0)[1].any() and video.frame(0).shape == (240, 428, 3)
