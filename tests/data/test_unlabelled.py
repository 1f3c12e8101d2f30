"""Sources without masks: what they find, how videos are cut, what the splits hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsam2.data.sources import open_stills, open_train, open_videos
from qsam2.errors import UserError
from qsam2.recipe import build_recipe
from qsam2.report.overlays import write_video


def pictures(folder: Path, count: int, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(np.full((16, 24, 3), index, np.uint8)).save(folder / f"{index:05d}.{suffix}")
    return folder


def film(file: Path, length: int) -> Path:
    write_video(str(file), (np.full((16, 24, 3), index, np.uint8) for index in range(length)), frames_per_second=10)
    return file


def names(spec: str) -> list[str]:
    return [video.name for video in open_videos(spec)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    pictures(tmp_path, 7, suffix)
    (tmp_path / "notes.txt").write_text("")
    whole = [f"{index:05d}.{suffix}" for index in range(7)]
    assert names(f"images:{tmp_path}:all") == whole
    assert names(f"images:{tmp_path}:val") == names(f"images:{tmp_path}") == [whole[0], whole[5]]
    assert names(f"images:{tmp_path}:train") == [*whole[1:5], whole[6]]
    assert names(f"images:{tmp_path / whole[2]}:val") == [whole[2]]  # of one picture every split is that picture
    still = open_videos(f"images:{tmp_path}:all")[3]
    assert len(still) == 1 and still.size == (16, 24) and still.frame(0).shape == (16, 24, 3)


@pytest.mark.parametrize(
    ("length", "pieces"),
    [(15, [15]), (16, [8, 8]), (64, [32, 32]), (130, [43, 43, 44])],
)
def test_a_video_is_cut_into_equal_pieces(tmp_path: Path, length: int, pieces: list[int]) -> None:
    spec = f"video:{film(tmp_path / 'a.mp4', length)}:all"
    videos = open_videos(spec)
    assert [len(video) for video in videos] == pieces
    assert [frame for video in videos for frame in video.frame_names] == [f"{index:05d}" for index in range(length)]
    assert len({video.name for video in videos}) == len(pieces)
    assert abs(int(videos[-1].frame(pieces[-1] - 1).mean()) - (length - 1)) <= 2


def test_videos_are_files_or_folders_of_frames(tmp_path: Path) -> None:
    film(tmp_path / "b.mp4", 3)
    film(tmp_path / "a.MOV", 3)
    (tmp_path / "notes.txt").write_text("")
    assert names(f"video:{tmp_path}:all") == ["a", "b"]
    frames = pictures(tmp_path / "frames" / "x", 3)
    assert names(f"video:{frames}:all") == ["x"]
    pictures(tmp_path / "frames" / "y", 3)
    assert names(f"video:{tmp_path / 'frames'}:all") == ["x", "y"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("images:{}", r"holds no pictures \(.jpg, .*\); .*/frames does: give images:.*/frames$"),
        ("images:{}/empty", r"empty: holds no pictures \(.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff\)$"),
        ("video:{}/empty", "empty: holds no video .* no frames and no folders of frames"),
        ("video:{}/broken.txt", r"broken.txt: cannot be read as a video .* re-encode it as mp4"),
        ("images:{}/absent", "there is no file or folder .*/absent; give .* images:FOLDER"),
        ("video:{}/absent", "there is no file or folder .*/absent; give .* video:FILE_OR_FOLDER"),
        ("images:{}/frames:test", "split 'test' of data without masks is unknown: give train, val or all"),
    ],
)
def test_errors(tmp_path: Path, spec: str, message: str) -> None:
    pictures(tmp_path / "frames", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.txt").write_text("no video")
    with pytest.raises(UserError, match=message):
        open_videos(spec.format(tmp_path))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"x.png: cannot be read as a picture"):
        open_videos(f"images:{tmp_path}:all")[1].frame(0)


def test_training_and_scored_stills_need_masks(tmp_path: Path) -> None:
    spec = f"images:{pictures(tmp_path, 3)}"
    with pytest.raises(UserError, match="training needs masks, and this source has none: .* train=null"):
        open_train(build_recipe({"data": {"train": ["moving_objects:1:train", spec]}, "train": {}}))
    with pytest.raises(UserError, match="evaluate.stills=images:.*: has no masks; name annotated images"):
        open_stills(build_recipe({"evaluate": {"stills": spec}}))
