"""Videos named by one string: every kind opens, and every mistake gets its one-line answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsam2.data.sources import KINDS, is_generated, open_videos
from qsam2.data.unlabelled import is_unlabelled
from qsam2.errors import UserError

PICTURE = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
MASK = Image.fromarray(np.eye(20, 30, dtype=np.uint8))
CODE = {"size": [20, 30], "counts": [0, 600]}


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """One tiny dataset of each kind in a folder of its name; each holds one video, and the masks show an object."""
    for place in ("davis", "sav/sav_val"):
        frames, masks = (
            ("JPEGImages_24fps", "Annotations_6fps/v/000") if "sav" in place else ("JPEGImages", "Annotations/v")
        )
        save(PICTURE, tmp_path / place / frames / "v/00000.jpg")
        save(MASK, tmp_path / place / masks / "00000.png")
    write(tmp_path / "davis/ImageSets/val.txt", "v\n")
    write(tmp_path / "sav/sav_val/sav_val.txt", "v\n")
    save(PICTURE, tmp_path / "coco/images/v.jpg")
    annotation = {"image_id": 1, "segmentation": CODE}
    coco = {"images": [{"id": 1, "file_name": "v.jpg"}], "annotations": [annotation]}
    write(tmp_path / "coco/instances.json", json.dumps(coco))
    save(PICTURE, tmp_path / "sa1b/v.jpg")
    write(tmp_path / "sa1b/v.json", json.dumps({"annotations": [annotation]}))
    save(PICTURE, tmp_path / "yolo/images/val/v.jpg")
    write(tmp_path / "yolo/labels/val/v.txt", "0 0 0 1 0 1 1\n")
    save(PICTURE, tmp_path / "instance_png/images/v.jpg")
    save(MASK, tmp_path / "instance_png/instance_png/v.png")
    save(PICTURE, tmp_path / "images/v.jpg")
    save(PICTURE, tmp_path / "video/v/0.jpg")
    return tmp_path


def check(message: str, *given, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_videos(*given, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "moving_objects"])
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
    assert len(open_videos("moving_objects")) == 20
    three = open_videos("moving_objects:3")
    assert [v.name for v in three] == [v.name for v in open_videos("moving_objects")[:3]]
    train = open_videos("moving_objects:3:train")
    assert {v.name for v in train}.isdisjoint(v.name for v in three)
    assert [v.name for v in open_videos("moving_objects:3", split="train")] == [v.name for v in train]
    assert len(open_videos("moving_objects", split="train")) == 10_000


def test_a_folder_that_exists_is_preferred_to_the_one_in_qsam2_data(roots, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("QSAM2_DATA", str(tmp_path_factory.mktemp("other")))
    monkeypatch.chdir(roots)
    assert len(open_videos("davis:davis")) == 1


def test_errors(roots, monkeypatch):
    monkeypatch.delenv("QSAM2_DATA", raising=False)
    check(
        "data 'daviss:x': 'daviss' is no kind of data; did you mean 'davis'. It is moving_objects, davis, .* or vi",
        "daviss:x",
    )
    check("did you mean 'moving_objects'", "moving-objects")
    check("data '': '' is no kind of data", "")
    check("data 'davis': needs the dataset's folder; write davis:FOLDER.:SPLIT. or give data.root=FOLDER", "davis")
    check(
        "data 'sav:nowhere:val': there is no folder nowhere; .* data.root=FOLDER or sav:FOLDER.* QSAM2_DATA",
        "sav:nowhere:val",
    )
    monkeypatch.setenv("QSAM2_DATA", str(roots))
    check("there is no folder nowhere nor .*/nowhere;", "davis:nowhere")
    check("there is no folder /nowhere;", "davis:/nowhere")
    check("data 'davis:a:b:c': has too many parts; write davis:FOLDER", "davis:a:b:c")
    check("data 'moving_objects:many': the number of videos is 'many'; write moving_objects", "moving_objects:many")
    check("moving_objects: count is 0", "moving_objects:0")
    check("moving_objects: split is 'x'", "moving_objects:2:x")
    check("the splits are val, all", "davis:davis:test")


def test_only_moving_objects_are_generated():
    assert [kind for kind in KINDS if is_generated(f"{kind}:somewhere:train")] == ["moving_objects"]
