"""Stills with instances: COCO, SA-1B, YOLO, instance PNGs; what is read, and the one-line error for each mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from qsam2.data.stills import coco_stills, instance_png_stills, sa1b_stills, yolo_stills
from qsam2.errors import UserError

SIZE = (20, 30)
BOX = [4, 2, 14, 2, 14, 12, 4, 12]  # x 4..14, y 2..12
real_data = pytest.mark.skipif("QSAM2_DATA" not in os.environ, reason="QSAM2_DATA does not name the real data's folder")


def box_mask() -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[2:12, 4:14] = True
    return mask


def rle(mask: np.ndarray) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def write_picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 77, np.uint8)).save(path)
    return path


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def coco_json(*segmentations, crowd=()) -> dict:
    annotations = [
        {"image_id": 1, "id": i, "segmentation": region, "iscrowd": int(i in crowd)}
        for i, region in enumerate(segmentations)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)]
    return {"images": images, "annotations": annotations}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for i in (1, 2):
        write_picture(tmp_path / "images" / f"{i}.png")
    write_json(tmp_path / "instances.json", coco_json([BOX], rle(box_mask()), rle(~box_mask()), crowd=(2,)))
    return tmp_path


def check(message: str, action) -> None:
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_coco_polygons_and_codes_without_crowds(coco):
    (still,) = coco_stills(coco, "val")  # picture 2 has no instances
    assert (still.name, still.frame_names, still.size, len(still)) == ("1", ["1"], SIZE, 1)
    assert still.frame(0).shape == (*SIZE, 3) and (still.frame(0) == 77).all()
    masks = still.masks(0)
    assert list(masks) == [1, 2]
    for mask in masks.values():
        np.testing.assert_array_equal(mask, box_mask())


def test_the_layout_of_the_full_coco(tmp_path):
    for i in (1, 2):
        write_picture(tmp_path / "val2017" / f"{i}.png")
    write_json(tmp_path / "annotations/instances_val2017.json", coco_json([BOX]))
    for split in ("val", "val2017"):
        assert [still.name for still in coco_stills(tmp_path, split)] == ["1"]


def test_polygons_are_united_and_those_without_area_ignored(coco):
    write_json(coco / "instances.json", coco_json([BOX, [20, 2, 24, 2, 24, 6, 20, 6], [1, 1, 2, 2]], [[1, 1, 2, 2]]))
    masks = coco_stills(coco, "val")[0].masks(0)
    both = box_mask()
    both[2:6, 20:24] = True
    np.testing.assert_array_equal(masks[1], both)
    assert not masks[2].any()


def test_errors_of_coco(coco, tmp_path_factory):
    path = coco / "instances.json"
    check("has neither instances.json nor annotations/instances_val.json", lambda: coco_stills(coco / "images", "val"))
    for region, message in (
        ([[1, 2, 3, 4, 5, 6, 7]], "a malformed polygon .*a coordinate lacks its pair"),
        ([["a", "b", "c", "d", "e", "f"]], "a malformed polygon"),
        (5, "a malformed polygon"),
        ({"size": [20, 30], "counts": [1, 2]}, "a malformed run-length code .*20x30"),
        (rle(np.ones((5, 5), bool)), "has a mask of 5x5"),
    ):
        write_json(path, coco_json(region))
        check(f"instances.json: (holds )?{message}", lambda: coco_stills(coco, "val")[0].masks(0))
    for data in ([], {"images": []}, {"images": [], "annotations": [{}]}, {"images": [], "annotations": [1]}):
        write_json(path, data)
        check("instances.json: is not COCO's instance format", lambda: coco_stills(coco, "val"))
    path.write_text("{")
    check("instances.json: is not valid JSON", lambda: coco_stills(coco, "val"))
    write_json(path, {"images": [], "annotations": []})
    check("instances.json: has no annotated pictures", lambda: coco_stills(coco, "val"))
    write_json(path, coco_json([BOX]))
    (coco / "images/1.png").rename(coco / "images/0.png")
    check(r"images/1.png: is missing, but .*instances.json annotates it \(1 missing", lambda: coco_stills(coco, "val"))
    (coco / "images").rename(coco / "pictures")
    check("images: is missing, it should hold the pictures of .*instances.json", lambda: coco_stills(coco, "val"))


def test_sa1b(tmp_path):
    for i in (1, 2):
        write_picture(tmp_path / f"sa_000/sa_{i}.jpg")
        path = tmp_path / f"sa_000/sa_{i}.json"
        write_json(path, {"image": {}, "annotations": [{"segmentation": rle(box_mask())}] * i})
    one, two = sa1b_stills(tmp_path)
    assert one.name == "sa_1" and list(two.masks(0)) == [1, 2]
    np.testing.assert_array_equal(one.masks(0)[1], box_mask())
    write_json(tmp_path / "sa_000/sa_1.json", {"masks": 1})
    check("sa_1.json: is not SA-1B's format", lambda: one.masks(0))
    (tmp_path / "sa_000/sa_2.jpg").unlink()
    check("sa_2.jpg: is missing, but sa_2.json annotates it", lambda: sa1b_stills(tmp_path))
    check("nowhere: has no annotated pictures", lambda: sa1b_stills(tmp_path / "nowhere"))


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    for i in (1, 2, 3):
        write_picture(tmp_path / f"images/train2017/{i}.jpg")
    (tmp_path / "labels/train2017").mkdir(parents=True)
    shares = [str(x / side) for x, side in zip(BOX, (30, 20) * 4, strict=True)]
    (tmp_path / "labels/train2017/1.txt").write_text(f"0 {' '.join(shares)}\n44 0 0 1 0 1 1 0 1\n")
    (tmp_path / "labels/train2017/2.txt").write_text("")
    return tmp_path


def test_yolo_polygons(yolo, caplog):
    (still,) = yolo_stills(yolo, "train")
    assert [s.name for s in yolo_stills(yolo, "train2017")] == [still.name] == ["1"]
    np.testing.assert_array_equal(still.masks(0)[1], box_mask())
    assert still.masks(0)[2].all()
    assert not caplog.records
    (yolo / "images/train2017/3.jpg").unlink()
    (yolo / "labels/train2017/3.txt").write_text("0 0 0 1 0 1 1\n")
    yolo_stills(yolo, "train")
    assert "1 label files have no picture and are left out (3.txt" in caplog.text


def test_errors_of_yolo(yolo):
    check("images: has no split 'val'; there is train2017", lambda: yolo_stills(yolo, "val"))
    (still,) = yolo_stills(yolo, "train")
    labels = yolo / "labels/train2017/1.txt"
    for text, message in (
        ("0 0.1 0.2 x", "line 1: is not a class and pairs of coordinates"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "line 1: is not a class and pairs of coordinates"),
        ("0 0 0 1 0 1 1\n0 0.5 0.5 0.2 0.2", "line 2: has 2 points, a polygon needs 3; boxes are not masks"),
        ("0 1 2 30 40 50 60", "line 1: coordinates must lie in 0..1"),
        ("0 nan 0 1 0 1 1", "line 1: coordinates must lie in 0..1"),
    ):
        labels.write_text(text)
        check(f"1.txt, {message}", lambda: still.masks(0))
    labels.write_text("")
    check("labels/train2017: has no annotated pictures", lambda: yolo_stills(yolo, "train"))


def test_instance_pngs(tmp_path):
    write_picture(tmp_path / "images/a.jpg")
    write_picture(tmp_path / "images/unlabelled.jpg")
    masks = tmp_path / "instance_png"
    masks.mkdir()
    check("instance_png: has no annotated pictures", lambda: instance_png_stills(tmp_path))
    ids = box_mask() * np.uint8(3)
    ids[0, 0] = 7
    Image.fromarray(ids).save(masks / "a.png")
    (still,) = instance_png_stills(tmp_path)
    assert list(still.masks(0)) == [3, 7]
    np.testing.assert_array_equal(still.masks(0)[3], box_mask())
    Image.fromarray(ids[:5]).save(masks / "a.png")
    check("instance_png/a.png: is 5x30 .* expected 20x30", lambda: still.masks(0))
    Image.fromarray(ids.astype(np.uint16) * 100).save(masks / "a.png")
    assert list(still.masks(0)) == [300, 700]
    Image.fromarray(ids).save(masks / "b.png")
    check("instance_png/b.png: is a mask without its picture", lambda: instance_png_stills(tmp_path))


@real_data
def test_real_stills_agree_with_their_instance_pngs():
    root = Path(os.environ["QSAM2_DATA"])
    polygons = {still.name: still for still in coco_stills(root / "coco_stills", "val")}
    indexed = {still.name: still for still in instance_png_stills(root / "coco_stills")}
    assert len(polygons) == 66 and set(polygons) == set(indexed)
    for name in sorted(polygons)[::8]:
        ours, theirs = (np.any(list(s[name].masks(0).values()), axis=0) for s in (polygons, indexed))
        assert (ours & ~theirs).mean() < 0.005 and ours.any(), name  # the index masks show crowds as well
    assert len(yolo_stills(root / "coco128_seg", "train")) == 126
    assert len(instance_png_stills(root / "dsb2018_cc0")) == 60
    for still in yolo_stills(root / "coco128_seg", "train")[:20]:
        assert all(mask.shape == still.size and mask.any() for mask in still.masks(0).values())
