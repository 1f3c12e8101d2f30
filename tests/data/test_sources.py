"""Videos named by one string: every kind opens, what has no masks is cut and split, every mistake gets its one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_datasets import check, film, save

from qsam2.data.sources import KINDS, open_stills, open_train, open_videos, source_of
from qsam2.data.unlabelled import is_unlabelled
from qsam2.errors import UserError
from qsam2.recipe import build_recipe

PICTURE = np.zeros((20, 30, 3), np.uint8)
MASK = np.eye(20, 30, dtype=np.uint8)
ANNOTATION = {"image_id": 1, "segmentation": {"size": [20, 30], "counts": [0, 600]}}
FILES = {
    "davis/JPEGImages/v/00000.jpg": PICTURE,
    "davis/Annotations/v/00000.png": MASK,
    "davis/ImageSets/val.txt": "v\n",
    "sav/sav_val/JPEGImages_24fps/v/00000.jpg": PICTURE,
    "sav/sav_val/Annotations_6fps/v/000/00000.png": MASK,
    "sav/sav_val/sav_val.txt": "v\n",
    "coco/images/v.jpg": PICTURE,
    "coco/instances.json": {"images": [{"id": 1, "file_name": "v.jpg"}], "annotations": [ANNOTATION]},
    "sa1b/v.jpg": PICTURE,
    "sa1b/v.json": {"annotations": [ANNOTATION]},
    "yolo/images/val/v.jpg": PICTURE,
    "yolo/labels/val/v.txt": "0 0 0 1 0 1 1\n",
    "instance_png/images/v.jpg": PICTURE,
    "instance_png/instance_png/v.png": MASK,
    "images/v.jpg": PICTURE,
    "video/v/0.jpg": PICTURE,
}


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """One tiny dataset of each kind in a folder of its name; each holds one video."""
    for path, content in FILES.items():
        save(tmp_path / path, content)
    return tmp_path


def names(spec: str, **options) -> list[str]:
    return [video.name for video in open_videos(spec, **options)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("moving_objects", "cut_outs")])
def test_every_kind_opens_by_string_or_by_root(roots, kind, monkeypatch):
    for videos in (
        open_videos(f"{kind}:{roots / kind}"),
        open_videos(f"{kind}:{roots / kind}:val", split="other"),
        open_videos(kind, root=roots / kind),
        open_videos(f"{kind}::val", root=str(roots / kind), split="other"),
    ):
        assert [video.name.removesuffix(".jpg") for video in videos] == ["v"]
        assert videos[0].frame(0).shape == (20, 30, 3)
        assert is_unlabelled(kind) or any(mask.any() for mask in videos[0].masks(0).values())
    monkeypatch.setenv("QSAM2_DATA", str(roots))
    assert len(open_videos(f"{kind}:{kind}")) == len(open_videos(kind, root=kind)) == 1


def test_moving_objects():
    val, train = names("moving_objects"), names("moving_objects", split="train")
    assert (len(val), len(train)) == (20, 10_000)
    assert names("moving_objects:3") == val[:3]
    assert names("moving_objects:3:train") == names("moving_objects:3", split="train") == train[:3]
    assert set(val).isdisjoint(train)


def test_cut_outs_are_clips_of_the_stills_with_an_object_that_can_move(tmp_path, monkeypatch):
    """One of two pictures shows a whole object and four others, of which the three largest count."""
    boxes = [(2, 2, 30, 40), (2, 50, 20, 30), (30, 70, 20, 10), (60, 70, 3, 3), (0, 90, 50, 30)]
    shapes = [*boxes, (0, 0, 1, 120)]
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h] for y, x, h, w in shapes]
    annotations = [{"image_id": 1 + index // 5, "segmentation": [corner]} for index, corner in enumerate(corners)]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)]
    save(tmp_path / "coco/instances.json", {"images": images, "annotations": annotations})
    for number in (1, 2):
        save(tmp_path / f"coco/images/{number}.jpg", np.full((80, 120, 3), 90, np.uint8))
    monkeypatch.setenv("QSAM2_DATA", str(tmp_path))
    (video,) = open_videos("cut_outs:coco")
    assert (video.name, len(video), video.size) == ("1-warped-0", 24, (240, 360))
    assert list(video.masks(0)) == [1, 2, 5]
    assert np.array_equal(video.frame(5), open_videos(f"cut_outs:{tmp_path}/coco:val")[0].frame(5))
    save(tmp_path / "coco/instances.json", {"images": images, "annotations": annotations[5:]})
    check("coco: shows no object that can be cut out, whole and on 1 to 25 %", lambda: open_videos("cut_outs:coco"))


@pytest.mark.parametrize(("size", "clip"), [((60, 1500), (240, 2048)), ((1500, 60), (2048, 240))])
def test_a_panorama_is_squeezed_to_the_longest_clip(tmp_path, size, clip):
    (height, width), (y, x) = size, (side // 4 for side in size)
    corner = [x, y, 3 * x // 2, y, 3 * x // 2, 3 * y // 2, x, 3 * y // 2]
    images = [{"id": 1, "file_name": "1.jpg"}]
    save(tmp_path / "instances.json", {"images": images, "annotations": [{"image_id": 1, "segmentation": [corner]}]})
    save(tmp_path / "images/1.jpg", np.full((height, width, 3), 90, np.uint8))
    (video,) = open_videos(f"cut_outs:{tmp_path}")
    assert video.size == clip and video.frame(0).shape[:2] == clip


def test_a_folder_that_exists_is_preferred_to_the_one_in_qsam2_data(roots, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("QSAM2_DATA", str(tmp_path_factory.mktemp("other")))
    monkeypatch.chdir(roots)
    assert names("davis:davis") == ["v"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_pictures_are_split_by_fives(tmp_path, suffix):
    whole = [save(tmp_path / f"{index:05d}.{suffix}", PICTURE).name for index in range(7)]
    save(tmp_path / "notes.txt", "")
    assert names(f"images:{tmp_path}:all") == whole
    assert names(f"images:{tmp_path}:val") == names(f"images:{tmp_path}") == [whole[0], whole[5]]
    assert names(f"images:{tmp_path}:train") == [*whole[1:5], whole[6]]
    assert names(f"images:{tmp_path / whole[2]}:val") == [whole[2]]  # of one picture every split is that picture
    still = open_videos(f"images:{tmp_path}:all")[3]
    assert len(still) == 1 and still.size == (20, 30) and still.frame(0).shape == (20, 30, 3)


@pytest.mark.parametrize(("length", "pieces"), [(15, [15]), (16, [8, 8]), (64, [32, 32]), (130, [43, 43, 44])])
def test_a_video_is_cut_into_equal_pieces(tmp_path, length, pieces):
    file = film(tmp_path / "a.mp4", (np.full((16, 32, 3), index, np.uint8) for index in range(length)))
    videos = open_videos(f"video:{file}:all")
    assert [len(video) for video in videos] == pieces
    assert [frame for video in videos for frame in video.frame_names] == [f"{index:05d}" for index in range(length)]
    assert len({video.name for video in videos}) == len(pieces)
    assert abs(int(videos[-1].frame(pieces[-1] - 1).mean()) - (length - 1)) <= 2


def test_videos_are_files_or_folders_of_frames(tmp_path):
    for name in ("b.mp4", "a.MOV"):
        film(tmp_path / name, [PICTURE] * 3)
    save(tmp_path / "notes.txt", "")
    assert names(f"video:{tmp_path}:all") == ["a", "b"]
    frames = save(tmp_path / "frames/x/0.png", PICTURE).parent
    assert names(f"video:{frames}:all") == ["x"]
    save(tmp_path / "frames/y/0.png", PICTURE)
    assert names(f"video:{frames.parent}:all") == ["x", "y"]


@pytest.mark.parametrize(
    ("kind", "file", "again"),
    [
        ("davis", "davis/Annotations/v/00000.png", "davis/Annotations/v/00000.tif"),
        ("sav", "sav/sav_val/Annotations_6fps/v/000/00000.png", "sav/sav_val/Annotations_6fps/v/000/00000.tif"),
        ("yolo", "yolo/images/val/v.jpg", "yolo/images/val/v.png"),
        ("instance_png", "instance_png/images/v.jpg", "instance_png/images/v.png"),
        ("instance_png", "instance_png/instance_png/v.png", "instance_png/instance_png/v.webp"),
    ],
)
def test_two_files_of_one_name_are_refused(roots, kind, file, again):
    save(roots / again, FILES[file])
    check(f"{file}: is there again as {Path(again).name}", lambda: open_videos(f"{kind}:{roots / kind}:val"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "daviss:x",
            "data 'daviss:x': 'daviss' is no kind of data; did you mean 'davis'. It is moving_objects, d.* or vi",
        ),
        ("moving-objects", "did you mean 'moving_objects'"),
        ("", "data '': '' is no kind of data"),
        ("davis", "data 'davis': needs the dataset's folder; write davis:FOLDER.:SPLIT. or give data.root=FOLDER"),
        (
            "sav:nowhere:val",
            "data 'sav:nowhere:val': there is no folder nowhere nor .*/nowhere; .* or sav:FOLDER.* QSAM2_DATA",
        ),
        ("davis:/nowhere", "there is no folder /nowhere;"),
        ("davis:~nobody.there/x", "there is no folder ~nobody.there/x nor"),
        ("davis:a:b:c", "data 'davis:a:b:c': has too many parts; write davis:FOLDER"),
        ("moving_objects:many", "data 'moving_objects:many': the number of videos is 'many'; write moving_objects"),
        ("moving_objects:0", "moving_objects: count is 0"),
        ("moving_objects:2:x", "moving_objects: split is 'x'"),
        ("davis:davis:test", "the splits are val, all"),
        ("images:{}/frames", r"holds no pictures \(.jpg, .*\); .*/frames/x does: give images:.*/frames/x$"),
        ("images:{}/empty", r"empty: holds no pictures \(.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff\)$"),
        ("video:{}/empty", "empty: holds no video .* no frames and no folders of frames"),
        ("video:{}/notes.txt", r"notes.txt: cannot be read as a video .* re-encode it as mp4"),
        ("images:{}/absent", "there is no file or folder .*/absent; give .* images:FOLDER"),
        ("video:{}/absent", "there is no file or folder .*/absent; give .* video:FILE_OR_FOLDER"),
        ("images:{}/frames/x:test", "split 'test' of data without masks is unknown: give train, val or all"),
    ],
)
def test_errors(roots, monkeypatch, spec, message):
    save(roots / "frames/x/0.png", PICTURE)
    (roots / "empty").mkdir()
    save(roots / "notes.txt", "no video")
    monkeypatch.setenv("QSAM2_DATA", str(roots))
    check(message, lambda: open_videos(spec.format(roots)))


def test_without_qsam2_data_one_folder_is_looked_for(monkeypatch):
    monkeypatch.delenv("QSAM2_DATA", raising=False)
    check(
        "there is no folder nowhere; .* data.root=FOLDER or sav:FOLDER.* QSAM2_DATA", lambda: open_videos("sav:nowhere")
    )


def test_a_damaged_picture_is_named(tmp_path):
    file = save(tmp_path / "x.png", b"no picture")
    check(r"x.png: cannot be read as a picture", lambda: open_videos(f"images:{file}")[0].frame(0))


@pytest.mark.parametrize(
    ("augment", "augmented"), [(True, [True, True]), ("real", [False, True]), (False, [False, False])]
)
def test_sources_are_augmented_as_the_recipe_says(roots, augment, augmented):
    train = ["moving_objects:1:train", f"instance_png:{roots / 'instance_png'}"]
    sources = open_train(build_recipe({"data": {"train": train, "augment": augment}, "train": {}}))
    assert [source.augment for source in sources] == augmented


def test_training_and_scored_stills_need_masks(roots):
    spec = f"images:{roots / 'images'}"
    training = build_recipe({"data": {"train": ["moving_objects:1:train", spec]}, "train": {}})
    check("training needs masks, and this source has none: .* train=null", lambda: open_train(training))
    scored = build_recipe({"evaluate": {"stills": spec}})
    check("evaluate.stills=images:.*: has no masks; name annotated images", lambda: open_stills(scored))


def test_a_folder_and_a_film_may_have_colons_in_their_names(tmp_path):
    film(tmp_path / "12:30.mp4", [PICTURE] * 3)
    for spec in (source_of(tmp_path / "12:30.mp4"), f"video:{tmp_path}/12:30.mp4:train"):
        assert names(spec) == ["12:30"]
    frames = save(tmp_path / "a:b/0.png", PICTURE).parent
    assert names(f"video:{frames}:all") == names(f"video:{frames}") == ["a:b"]
    assert build_recipe({"data": {"train": [f"video:{frames}:train"]}}).data.scored == f"video:{frames}"


@pytest.mark.parametrize("number", ["²", "1" * 5000, "1000001"])
def test_impossible_numbers_of_videos(number):
    with pytest.raises(UserError, match="the number of videos is|give a whole number from 1 to 1000000"):
        open_videos(f"moving_objects:{number}")


def test_films_of_one_name_are_told_apart(tmp_path):
    for name in ("a.mp4", "a.mov", "b.mkv", "c.m2ts"):
        film(tmp_path / name, [PICTURE] * 3)
    assert names(f"video:{tmp_path}:all") == ["a.mov", "a.mp4", "b", "c"]


def test_pictures_of_one_name_in_several_folders_are_refused(roots):
    for name in ("v.jpg", "v.json"):
        save(roots / "sa1b/more" / name, FILES[f"sa1b/{name}"])
    check("holds 'v' twice; rename or remove one", lambda: open_videos(f"sa1b:{roots / 'sa1b'}"))


def test_the_name_of_a_relative_folder(tmp_path, monkeypatch):
    save(tmp_path / "frames/0.png", PICTURE)
    (tmp_path / "frames/inner").mkdir()
    for place, root in (("frames", "."), ("frames/inner", "..")):
        monkeypatch.chdir(tmp_path / place)
        assert names(f"video:{root}:all") == ["frames"]
