"""Readers of annotated videos and of video files: what they read, and the one-line error for each mistake."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask
from small_datasets import box, check, film, rle, save

from qsam2.data.index_masks import read_ids
from qsam2.data.pictures import read_frame
from qsam2.data.regions import decode_rle
from qsam2.data.video_datasets import _read_masklets, davis_videos, sav_videos
from qsam2.errors import UserError

SIZE = (32, 48)
FRAMES = 10
IDS = box(SIZE, 2, 2, 6, 6) * np.uint8(1) + box(SIZE, 10, 10, 10, 10) * np.uint8(2)
VOID = IDS + box(SIZE, 22, 20, 10, 28) * np.uint8(255)


def picture(index: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth picture, distinct for each index."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([rows * 5, columns * 5, np.full(size, 20 * index)], -1).astype(np.uint8)


def frames(folder: Path, count: int = FRAMES) -> Path:
    for i in range(count):
        save(folder / f"{i:05d}.jpg", picture(i))
    return folder


def sequence(root: Path, name: str, count: int = 3, annotated=(0, 1, 2), below: str = "") -> None:
    frames(root / "JPEGImages" / below / name, count)
    for i in annotated:
        save(root / "Annotations" / below / name / f"{i:05d}.png", VOID, "P")


def square(k: int, annotated: int) -> np.ndarray:
    return box(SIZE, 2 + k, annotated, 10, 8)


def masklets(objects: int) -> dict:
    return {"masklet": [[rle(square(k, a)) for k in range(objects)] for a in range(3)]}


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    for name in ("bear", "dance"):
        sequence(tmp_path / "davis", name)
    save(tmp_path / "davis/ImageSets/val.txt", "dance\nbear\n")
    return tmp_path / "davis"


@pytest.fixture
def sav(tmp_path: Path) -> Path:
    """A training and a validation video of SA-V; `sav_9` is not listed and has no masks."""
    film(tmp_path / "sav/sav_000/sav_000001.mp4", map(picture, range(FRAMES)))
    save(tmp_path / "sav/sav_000/sav_000001_manual.json", masklets(2))
    save(tmp_path / "sav/sav_000/sav_000001_auto.json", masklets(5))
    folder = tmp_path / "sav/sav_val"
    frames(folder / "JPEGImages_24fps/sav_7")
    for k, i in (("000", 0), ("000", 4), ("000", 8), ("002", 4)):
        save(folder / f"Annotations_6fps/sav_7/{k}/{i:05d}.png", square(int(k), i // 4) * np.uint8(255))
    save(folder / "sav_val.txt", "sav_7\n")
    frames(folder / "JPEGImages_24fps/sav_9", 1)
    (folder / "Annotations_6fps/sav_9").mkdir()
    return tmp_path / "sav"


def test_frames_and_masks_of_davis_are_those_of_the_files(davis):
    dance, bear = davis_videos(davis, "val")
    assert (dance.name, bear.name, len(bear), bear.size) == ("dance", "bear", 3, SIZE)
    assert bear.frame_names == ["00000", "00001", "00002"] and bear.frame(1).dtype == np.uint8
    np.testing.assert_array_equal(bear.frame(1), np.array(Image.open(davis / "JPEGImages/bear/00001.jpg")))
    masks = bear.masks(0)
    assert list(masks) == [1, 2]  # 255 is void
    np.testing.assert_array_equal(masks[2], IDS == 2)
    save(davis / "ImageSets/2016/val.txt", "bear")
    assert [video.name for video in davis_videos(davis, "2016/val")] == ["bear"]
    assert [video.name for video in davis_videos(davis, "all")] == ["bear", "dance"]


@pytest.mark.parametrize("folder", ["ImageSets", "ImageSets/2017", "ImageSets/2016", "ImageSets/480p"])
@pytest.mark.parametrize("name", ["bear", "a bear"])
def test_the_480p_layout_of_both_years(tmp_path, folder, name):
    sequence(tmp_path, name, below="480p")
    lines = [f"/JPEGImages/480p/{name}/0000{i}.jpg /Annotations/480p/{name}/0000{i}.png\n\n" for i in range(2)]
    save(tmp_path / folder / "train.txt", "".join(lines))
    assert [video.name for video in davis_videos(tmp_path, "train")] == [name]


def test_youtube_vos_takes_all_sequences_and_frames_in_the_order_of_their_numbers(tmp_path):
    sequence(tmp_path / "train", "abc", count=6, annotated=(0, 5))
    save(tmp_path / "train/JPEGImages/abc/10.jpg", picture())
    save(tmp_path / "train/JPEGImages/abc/6.jpg", picture())
    (video,) = davis_videos(tmp_path, "train")
    assert video.frame_names[5:] == ["00005", "6", "10"] and video.annotated_frames == [0, 5]
    assert video.masks(1) is None and set(video.masks(5)) == {1, 2}


@pytest.mark.parametrize(
    ("values", "mode", "ids"),
    [
        ((0, 255), "L", {1}),  # DAVIS-2016
        ((0, 1, 2), "L", {1, 2}),
        ((0, 1, 255), "L", {1}),  # beside ids 255 is void
        ((0, 1, 2, 255), "P", {1, 2}),
        ((0, 255), "P", set()),  # a palette's 255 is void
        ((0,), "P", set()),
        ((False, True), None, {1}),  # one bit
        (((0,) * 3, (255,) * 3), None, {1}),  # grey saved in colour
    ],
)
def test_ids_of_a_mask_file(tmp_path, values, mode, ids):
    pixels = np.array([values] * 5, bool if values == (False, True) else np.uint8)
    found = read_ids(save(tmp_path / "mask.png", pixels, mode))
    assert found.shape == pixels.shape[:2] and set(np.unique(found)) == {0} | ids


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_lists_in_any_usual_encoding(davis, sav, encoding):
    sequence(davis, "bär")
    save(davis / "ImageSets/val.txt", "bear/\r\nbär\r\n\r\nbear\r\n".encode(encoding))
    assert [video.name for video in davis_videos(davis, "val")] == ["bear", "bär"]
    save(sav / "sav_val/sav_val.txt", "sav_7\r\n".encode(encoding))
    assert [video.name for video in sav_videos(sav, "val")] == ["sav_7"]


@pytest.mark.parametrize("frames_as_pictures", [False, True])
def test_json_masklets_on_every_fourth_frame(sav, frames_as_pictures):
    if frames_as_pictures:
        (sav / "sav_000/sav_000001.mp4").unlink()
        frames(sav / "JPEGImages_24fps/sav_000001")
    (video,) = sav_videos(sav, "train")
    assert (video.name, len(video), video.size) == ("sav_000001", FRAMES, SIZE)
    assert video.annotated_frames == [0, 4, 8] and video.frame_names[4] == "00004"
    assert video.masks(1) is None
    masks = video.masks(8)
    assert list(masks) == [1, 2] and masks[2].dtype == bool
    np.testing.assert_array_equal(masks[2], square(1, 2))
    assert np.abs(video.frame(7).astype(int) - picture(7)).mean() <= 4  # both codecs lose a little
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(video)).frame(7), video.frame(7))
    assert [len(v.masks(0)) for v in sav_videos(sav, "auto")] == [5]


def test_numbers_of_frames_may_begin_anywhere_and_the_masks_fit_into_them(sav):
    (sav / "sav_000/sav_000001.mp4").unlink()
    folder = frames(sav / "JPEGImages_24fps/sav_000001")
    (folder / "00000.jpg").unlink()
    (video,) = sav_videos(sav, "train")
    assert video.frame_names[0] == "00001" and video.annotated_frames == [0, 4, 8]  # as many frames as masks need
    (folder / "00009.jpg").unlink()
    check("has masks up to frame 8, but its video has only 8 frames", lambda: sav_videos(sav, "train")[0].masks(0))


def test_the_film_beside_the_masklets_comes_before_a_folder_of_frames(sav):
    frames(sav / "JPEGImages_24fps/sav_000001", 9)
    assert len(sav_videos(sav, "train")[0]) == FRAMES


def test_an_absent_masklet_is_an_object_out_of_view(sav):
    regions = masklets(2)
    regions["masklet"][1][0] = None
    save(sav / "sav_000/sav_000001_manual.json", regions)
    assert list(sav_videos(sav, "manual")[0].masks(4)) == [2]


def test_object_folders_of_val_and_test(sav):
    (video,) = sav_videos(sav, "val")
    assert video.name == "sav_7" and video.annotated_frames == [0, 4, 8]
    assert [sorted(video.masks(i)) for i in (0, 4, 8)] == [[1], [1, 3], [1]]
    np.testing.assert_array_equal(video.masks(4)[3], square(2, 1))
    assert video.masks(2) is None
    save(sav / "sav_val/Annotations_6fps/sav_7/000/00004.png", square(0, 1) * np.uint8(3))  # any grey is object 000
    np.testing.assert_array_equal(sav_videos(sav, "val")[0].masks(4)[1], square(0, 1))
    save(sav / "sav_val/val.txt", "sav_7\n")
    assert [v.name for v in sav_videos(sav / "sav_val", "val")] == ["sav_7"]


MANUAL, VAL = "sav/sav_000/sav_000001_manual.json", "sav/sav_val"
MASKS, LIST = f"{VAL}/Annotations_6fps/sav_7", f"{VAL}/sav_val.txt"
GOOD = rle(square(0, 0))
BEYOND = chr(ord(GOOD["counts"][0]) + 64) + GOOD["counts"][1:]  # the same code in its lower six bits
CODES = ["zzzz", BEYOND, "", "`", [40, 8], [32 * 48 + 1, -1], [0.5, 1535.5], None, GOOD["counts"][:-2]]


@pytest.mark.parametrize(
    ("path", "content", "split", "message"),
    [
        ("davis/new.txt", "", "test", "has no test.txt; the splits are val, all"),
        ("davis/Annotations/bear/7.png", IDS, "val", "bear/7.png: is a mask without its frame"),
        ("davis/ImageSets/empty.txt", "\n", "empty", "empty.txt: lists no sequences"),
        ("davis/ImageSets/odd.txt", "bear\nhorse", "odd", "lacks the sequence 'horse', listed in the split 'odd'"),
        ("davis/JPEGImages/void/new.txt", "", "all", "JPEGImages/void: holds no frames"),
        ("davis/JPEGImages/void/0.jpg", picture(), "all", "Annotations/void: holds no masks"),
        ("davis/train/JPEGImages/new.txt", "", "train", "train/JPEGImages: holds no sequences"),
        ("davis/JPEGImages/bear/00000.png", picture(), "val", "JPEGImages/bear: holds two pictures named 00000"),
        ("davis/JPEGImages/bear/00001.jpg", picture()[:20], "val", "bear/00001.jpg: is 20x48 .* expected 32x48"),
        ("davis/Annotations/bear/00001.png", IDS[:, :30], "val", "bear/00001.png: is 32x30 .* expected 32x48"),
        ("davis/Annotations/bear/00001.png", picture(), "val", "a mask picture holds one object id .* is RGB"),
        ("sav/new.txt", "", "test", "has no test.txt or sav_test.txt; the splits are train, auto, val and test"),
        (f"{MASKS}/000/00099.png", IDS, "val", "000/00099.png: is a mask without its frame"),
        (f"{MASKS}/002/00004.png", b"", "val", "002/00004.png: cannot be read as a picture"),
        (f"{MASKS}/002/00004.png", IDS[:30], "val", "002/00004.png: is 30x48 .* expected 32x48"),
        (f"{MASKS}/object/new.txt", "", "val", "sav_7/object: is not an object's folder"),
        (LIST, "sav_7\nsav_8\n", "val", "JPEGImages_24fps/sav_8: is missing, but .*sav_val.txt lists sav_8"),
        (LIST, "\n", "val", "sav_val.txt: lists no videos"),
        (LIST, "..", "val", "JPEGImages_24fps/..: is missing, but .*sav_val.txt lists"),
        (LIST, "x" * 5000, "val", r"\.\.\.x+: is missing, but .*sav_val.txt lists x+\.\.\.x+; "),
        (LIST, b"\xff\xfea", "val", "sav_val.txt is no text"),
        (f"{MASKS}/0/00004.png", IDS, "val", "sav_7: has two folders of one number"),
        (f"{MASKS}/²/00004.png", IDS, "val", "sav_7/²: is not an object's folder"),
        (MANUAL, "[" * 5000, "train", "manual.json is not SA-V's annotation"),
        (MANUAL, {"masklet": []}, "train", "manual.json is not SA-V's annotation"),
        (MANUAL, {"masklet": [[1]]}, "train", "manual.json is not SA-V's annotation"),
        (LIST, "sav_9", "val", "Annotations_6fps/sav_9: holds no object folders"),
        (MANUAL, '{"masklet": [[', "train", "manual.json is not SA-V's annotation"),
        (MANUAL, {"masks": []}, "train", "manual.json is not SA-V's annotation"),
        (MANUAL, ["masklet"], "train", "manual.json is not SA-V's annotation"),
        (MANUAL, {"masklet": [[{"size": SIZE}]]}, "train", "manual.json: holds a malformed run-length code"),
        *((MANUAL, {"masklet": [[GOOD | {"counts": code}]]}, "train", "a malformed run-length code") for code in CODES),
        (MANUAL, {"masklet": [[rle(IDS[:30])]]}, "train", "has a mask of 30x48 .* its picture is 32x48"),
        (MANUAL, {"masklet": [[GOOD]] * 4}, "train", "has masks up to frame 12, but its video has only 10"),
    ],
)
def test_errors(davis, sav, path, content, split, message):
    """One file is added or replaced; then everything is opened and read."""
    save(davis.parent / path, content)
    _read_masklets.cache_clear()
    kind = path.split("/")[0]

    def read() -> None:
        for video in {"davis": davis_videos, "sav": sav_videos}[kind](davis.parent / kind, split):
            for index in range(len(video)):
                video.frame(index), video.masks(index)

    check(message, read)


def test_errors_of_absent_files(davis, sav):
    check("nowhere: has neither JPEGImages/ nor val/JPEGImages/", lambda: davis_videos(davis / "nowhere", "val"))
    check("Annotations: has no VIDEO_auto.json in it", lambda: sav_videos(davis / "Annotations", "auto"))
    (sav / "sav_000/sav_000001.mp4").unlink()
    check("_manual.json: has no frames: neither .*1.mp4 nor .*sav_000001 exists", lambda: sav_videos(sav, "train"))
    (frames(sav / "JPEGImages_24fps/sav_000001") / "00003.jpg").unlink()
    check("the frames of its video are not numbered without gaps", lambda: sav_videos(sav, "train")[0].masks(0))
    for path in (sav / "JPEGImages_24fps/sav_000001").iterdir():
        path.rename(path.with_stem(f"frame{path.stem}"))
    check("has the frame 'frame00000'; SA-V's are named by numbers", lambda: sav_videos(sav, "train")[0].masks(0))
    save(davis / "JPEGImages/bear/00000.jpg", b"no picture")  # the first is read at opening, for its size
    check("JPEGImages/bear/00000.jpg: cannot be read as a picture", lambda: davis_videos(davis, "val"))


def encoded(pixels: np.ndarray, suffix: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, suffix)
    return stream.getvalue()


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_picture_is_an_error_not_grey_pixels(tmp_path_factory, share):
    for suffix, pixels, read in (("JPEG", picture(), read_frame), ("PNG", IDS, read_ids)):
        data = encoded(pixels, suffix)
        pixels_end = len(data) - 12 * (suffix == "PNG")  # a PNG's last chunk holds none
        path = save(tmp_path_factory.mktemp("cut") / f"a.{suffix}", data[: int(share * pixels_end)])
        check(f"a.{suffix}: cannot be read as a picture", lambda read=read, path=path: read(path, SIZE))


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_mask_is_an_error_or_harmless(tmp_path_factory, position, flip):
    ids = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
    data = bytearray(encoded(ids, "PNG"))
    data[int(position * len(data))] ^= flip
    path = save(tmp_path_factory.mktemp("flip") / "mask.png", bytes(data))
    try:
        found = read_ids(path)
    except UserError:
        return
    np.testing.assert_array_equal(found, ids)


@given(mask=arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_run_length_codes_are_decoded_as_pycocotools_does(mask):
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0, append=2)), prepend=0).tolist()
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))  # its counts are bytes
    for region in (code, rle(mask), {"size": list(mask.shape), "counts": runs}):
        np.testing.assert_array_equal(decode_rle(region, mask.shape, Path("x")), mask)


def test_a_run_may_be_as_long_as_a_large_picture():
    assert decode_rle(rle(np.ones((4100, 4100), bool)), (4100, 4100), Path("x")).all()


def test_the_real_davis_2016(data_root):
    train, val = (davis_videos(data_root / "davis16_240p", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (22, 7)
    assert not {video.name for video in train} & {video.name for video in val}
    large = {video.name: video for video in davis_videos(data_root / "davis16_480p", "all")}
    assert large["soccerball"].size == (480, 854) and set(large["soccerball"].masks(0)) == {1}
    for video in val:
        assert video.annotated_frames == list(range(len(video)))
        assert video.masks(0)[1].any() and video.frame(0).shape == (240, 428, 3)


def test_a_real_masklet_file(tmp_path, data_root):
    source = data_root / "sav_example/sav_000001_manual.json"
    save(tmp_path / source.name, source.read_bytes())
    first = save(tmp_path / "JPEGImages_24fps/sav_000001/00000.png", np.zeros((848, 480, 3), np.uint8))
    for i in range(1, 483):
        os.link(first, first.with_name(f"{i:05d}.png"))
    (video,) = sav_videos(tmp_path, "train")
    assert len(video.annotated_frames) == 121 and video.annotated_frames[-1] == 480
    regions = json.loads(source.read_text())["masklet"]
    for i in range(0, 483, 40):
        expected = [coco_mask.decode(region).astype(bool) for region in regions[i // 4]]
        for k, mask in video.masks(i).items():
            np.testing.assert_array_equal(mask, expected[k - 1])
