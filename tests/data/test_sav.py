"""SA-V's readers and video files: what they read, and the one-line error for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask

from qsam2.data.footage import FrameFolder, VideoFile
from qsam2.data.pictures import decode_rle
from qsam2.data.sav import _read_masklets, sav_videos
from qsam2.errors import UserError

SIZE = (32, 48)
FRAMES = 10
real_data = pytest.mark.skipif("QSAM2_DATA" not in os.environ, reason="QSAM2_DATA does not name the real data's folder")


def picture(index: int) -> np.ndarray:
    return np.full((*SIZE, 3), (20 * index, 100, 240 - 20 * index), np.uint8)


def write_mp4(path: Path, frames: int = FRAMES, gop: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.max_b_frames = *SIZE, "yuv420p", gop, 2
        stream.bit_rate = 4_000_000
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: int = FRAMES) -> Path:
    folder.mkdir(parents=True)
    for i in range(frames):
        Image.fromarray(picture(i)).save(folder / f"{i:05d}.jpg")
    return folder


def square(k: int, annotated: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[2 + k : 12 + k, annotated : annotated + 8] = True
    return mask


def rle(mask: np.ndarray) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def write_json(path: Path, annotated: int = 3, objects: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    masklet = [[rle(square(k, a)) for k in range(objects)] for a in range(annotated)]
    path.write_text(json.dumps({"video_id": path.stem, "masklet": masklet, "masklet_id": list(range(objects))}))
    return path


def check(message: str, action) -> None:
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    write_mp4(tmp_path / "sav_000" / "sav_000001.mp4")
    write_json(tmp_path / "sav_000" / "sav_000001_manual.json")
    write_json(tmp_path / "sav_000" / "sav_000001_auto.json", objects=5)
    return tmp_path


@pytest.fixture
def val(tmp_path: Path) -> Path:
    folder = tmp_path / "sav_val"
    write_frames(folder / "JPEGImages_24fps" / "sav_7")
    for k, frames in (("000", (0, 4, 8)), ("002", (4,))):
        (folder / "Annotations_6fps" / "sav_7" / k).mkdir(parents=True)
        for i in frames:
            mask = square(int(k), i // 4)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"Annotations_6fps/sav_7/{k}/{i:05d}.png")
    (folder / "sav_val.txt").write_text("sav_7\n")
    return tmp_path


@pytest.mark.parametrize("frames_as_pictures", [False, True])
def test_json_masklets_on_every_fourth_frame(train, frames_as_pictures):
    if frames_as_pictures:
        (train / "sav_000/sav_000001.mp4").unlink()
        write_frames(train / "JPEGImages_24fps/sav_000001")
    (video,) = sav_videos(train, "train")
    assert (video.name, len(video), video.size) == ("sav_000001", FRAMES, SIZE)
    assert video.annotated_frames == [0, 4, 8] and video.frame_names[4] == "00004"
    assert video.masks(1) is None
    masks = video.masks(8)
    assert list(masks) == [1, 2] and masks[2].dtype == bool
    np.testing.assert_array_equal(masks[2], square(1, 2))
    assert np.abs(video.frame(7).astype(int) - picture(7)).max() <= 8  # both codecs lose a little
    assert [len(v.masks(0)) for v in sav_videos(train, "auto")] == [5]


def test_an_absent_masklet_is_an_object_out_of_view(train):
    path = train / "sav_000/sav_000001_manual.json"
    data = json.loads(path.read_text())
    data["masklet"][1][0] = None
    path.write_text(json.dumps(data))
    assert list(sav_videos(train, "manual")[0].masks(4)) == [2]


def test_object_folders_of_val_and_test(val):
    (video,) = sav_videos(val, "val")
    assert video.name == "sav_7" and video.annotated_frames == [0, 4, 8]
    assert [sorted(video.masks(i)) for i in (0, 4, 8)] == [[1], [1, 3], [1]]
    np.testing.assert_array_equal(video.masks(4)[3], square(2, 1))
    assert video.masks(2) is None
    (val / "sav_val/val.txt").write_text("sav_7\n")
    assert [v.name for v in sav_videos(val / "sav_val", "val")] == ["sav_7"]


def test_videos_can_be_sent_to_workers(train):
    (video,) = sav_videos(train, "train")
    before = video.frame(5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(video)).frame(5), before)


def test_any_frame_of_a_video_file_equals_decoding_from_the_start(tmp_path):
    path = write_mp4(tmp_path / "long.mp4", frames=120, gop=25)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = VideoFile(path)
    assert len(video) == 120 and video.masks(3) is None
    for i in [0, 1, 5, 4, 119, 60, 60, 61, 24, 25, 118, 0]:
        np.testing.assert_array_equal(video.frame(i), expected[i], err_msg=str(i))


def test_errors_of_video_files(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    check("broken.mp4: cannot be read as a video", lambda: VideoFile(broken).size)
    check("nowhere.mp4: cannot be read as a video", lambda: VideoFile(tmp_path / "nowhere.mp4").frame(0))
    whole = write_mp4(tmp_path / "whole.mp4").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    check("broken.mp4: (cannot be read as a video|holds no video stream)", lambda: len(VideoFile(broken)))
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    check("sound.wav: holds no video stream", lambda: VideoFile(sound).size)
    check("empty: holds no frames", lambda: FrameFolder(tmp_path / "empty"))
    with pytest.raises(IndexError):
        VideoFile(tmp_path / "whole.mp4").frame(FRAMES)


def test_a_video_that_is_cut_short_behind_its_index_is_an_error(tmp_path):
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(60):
            noise = np.random.default_rng(i).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    check("fast.mp4: holds .. of 60 frames, it was cut short", lambda: len(VideoFile(path)))


def test_errors_of_masklet_files(train):
    path = train / "sav_000/sav_000001_manual.json"

    def masks(text: str, index: int = 0):
        path.write_text(text)
        _read_masklets.cache_clear()
        return lambda: sav_videos(train, "train")[0].masks(index)

    good = rle(square(0, 0))
    check("manual.json: is not valid JSON", masks('{"masklet": [['))
    check("manual.json: has no list 'masklet'", masks('{"masks": []}'))
    check("manual.json: has no list 'masklet'", masks('["masklet"]'))
    check("manual.json: holds a malformed run-length code", masks(json.dumps({"masklet": [[{"size": [32, 48]}]]})))
    for counts in ("zzzz", "", "`", [40, 8], [32 * 48 + 1, -1], [0.5, 1535.5], None, good["counts"][:-2]):
        wild = {"size": [32, 48], "counts": counts}
        check("manual.json: holds a malformed run-length code", masks(json.dumps({"masklet": [[wild]]})))
    other = rle(np.ones((30, 48), bool))
    check(r"manual.json: has a mask of 30x48 .* its picture is 32x48", masks(json.dumps({"masklet": [[other]]})))
    check(
        "manual.json: has masks up to frame 12, but its video has only 10", masks(json.dumps({"masklet": [[good]] * 4}))
    )


def test_errors_of_the_json_layout(train):
    check("sav_000: has no VIDEO_auto.json in it", lambda: sav_videos(write_empty(train / "new/sav_000"), "auto"))
    (train / "sav_000/sav_000001.mp4").unlink()
    check(
        "_manual.json: has no frames: neither .*000001.mp4 nor .*sav_000001 exists", lambda: sav_videos(train, "train")
    )
    write_frames(train / "JPEGImages_24fps/sav_000001")
    (train / "JPEGImages_24fps/sav_000001/00003.jpg").unlink()
    check("the frames of its video are not numbered without gaps", lambda: sav_videos(train, "train")[0].masks(0))


def write_empty(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_errors_of_the_folder_layout(val):
    check("has no test.txt or sav_test.txt; the splits are train, auto, val and test", lambda: sav_videos(val, "test"))
    masks = val / "sav_val/Annotations_6fps/sav_7"
    (masks / "000/00099.png").write_bytes((masks / "000/00000.png").read_bytes())
    check("000/00099.png: is a mask without its frame", lambda: sav_videos(val, "val")[0].masks(0))
    (masks / "000/00099.png").unlink()
    (masks / "002/00004.png").write_bytes(b"")
    check("002/00004.png: cannot be read as a picture", lambda: sav_videos(val, "val")[0].masks(4))
    Image.fromarray(np.zeros((30, 48), np.uint8)).save(masks / "002/00004.png")
    check("002/00004.png: is 30x48 .* expected 32x48", lambda: sav_videos(val, "val")[0].masks(4))
    (masks / "object").mkdir()
    check("sav_7/object: is not an object's folder", lambda: sav_videos(val, "val"))
    (val / "sav_val/sav_val.txt").write_text("sav_7\nsav_8\n")
    (masks / "object").rmdir()
    check("JPEGImages_24fps/sav_8: is missing, but .*sav_val.txt lists sav_8", lambda: sav_videos(val, "val"))
    (val / "sav_val/sav_val.txt").write_text("\n")
    check("sav_val.txt: lists no videos", lambda: sav_videos(val, "val"))
    (val / "sav_val/sav_val.txt").write_text("sav_9")
    write_empty(val / "sav_val/Annotations_6fps/sav_9")
    write_frames(val / "sav_val/JPEGImages_24fps/sav_9")
    check("Annotations_6fps/sav_9: holds no object folders", lambda: sav_videos(val, "val"))


@given(mask=arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_run_length_codes_are_decoded_as_pycocotools_does(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    np.testing.assert_array_equal(decode_rle(code, mask.shape, Path("x")), mask)
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0, append=2)), prepend=0).tolist()
    uncompressed = {"size": list(mask.shape), "counts": runs}
    np.testing.assert_array_equal(decode_rle(uncompressed, mask.shape, Path("x")), mask)


@real_data
def test_a_real_masklet_file(tmp_path):
    source = Path(os.environ["QSAM2_DATA"]) / "sav_example" / "sav_000001_manual.json"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    frames = tmp_path / "JPEGImages_24fps" / "sav_000001"
    frames.mkdir(parents=True)
    blank = Image.new("RGB", (480, 848))
    for i in range(483):
        blank.save(frames / f"{i:05d}.png", compress_level=0) if i == 0 else os.link(
            frames / "00000.png", frames / f"{i:05d}.png"
        )
    (video,) = sav_videos(tmp_path, "train")
    assert len(video.annotated_frames) == 121 and video.annotated_frames[-1] == 480
    regions = json.loads(source.read_text())["masklet"]
    for i in range(0, 483, 40):
        expected = [coco_mask.decode(region).astype(bool) for region in regions[i // 4]]
        for k, mask in video.masks(i).items():
            np.testing.assert_array_equal(mask, expected[k - 1])
