"""Stills with instances: COCO, SA-1B, YOLO, instance PNGs; what is read, and the one-line error for each mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_datasets import box, check, rle, save

from qsam2.data.stills import coco_stills, instance_png_stills, sa1b_stills, yolo_stills

SIZE = (20, 30)
BOX = [4, 2, 14, 2, 14, 12, 4, 12]  # x 4..14, y 2..12
MASK = box(SIZE, 2, 4, 10, 10)
PICTURE = np.full((*SIZE, 3), 77, np.uint8)


def coco_json(*segmentations, crowd: int | None = None) -> dict:
    regions = [{"image_id": 1, "segmentation": s, "iscrowd": int(i == crowd)} for i, s in enumerate(segmentations)]
    return {"images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)], "annotations": regions}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for i in (1, 2):
        save(tmp_path / f"images/{i}.png", PICTURE)
    save(tmp_path / "instances.json", coco_json([BOX], rle(MASK), rle(~MASK), crowd=2))
    return tmp_path


def test_coco_polygons_and_codes_without_crowds(coco):
    (still,) = coco_stills(coco, "val")  # picture 2 has no instances
    assert (still.name, still.frame_names, still.size, len(still)) == ("1", ["1"], SIZE, 1)
    np.testing.assert_array_equal(still.frame(0), PICTURE)
    masks = still.masks(0)
    assert list(masks) == [1, 2]
    for mask in masks.values():
        np.testing.assert_array_equal(mask, MASK)


def test_the_layout_of_the_full_coco(tmp_path):
    save(tmp_path / "val2017/1.png", PICTURE)
    save(tmp_path / "annotations/instances_val2017.json", coco_json([BOX]))
    for split in ("val", "val2017"):
        assert [still.name for still in coco_stills(tmp_path, split)] == ["1"]


def test_polygons_are_united_and_those_without_area_ignored(coco):
    line = [1, 1, 2, 2]
    save(coco / "instances.json", coco_json([BOX, [20, 2, 24, 2, 24, 6, 20, 6], line], [line]))
    masks = coco_stills(coco, "val")[0].masks(0)
    np.testing.assert_array_equal(masks[1], MASK | box(SIZE, 2, 20, 4, 4))
    assert not masks[2].any()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "holds a malformed polygon .*a coordinate lacks its pair"),
        ([["a", "b", "c", "d", "e", "f"]], "holds a malformed polygon"),
        (5, "holds a malformed polygon"),
        ({"size": [20, 30], "counts": [1, 2]}, "holds a malformed run-length code .*20x30"),
        (rle(np.ones((5, 5), bool)), "has a mask of 5x5"),
    ],
)
def test_errors_of_coco_regions(coco, region, message):
    save(coco / "instances.json", coco_json(region))
    check(f"instances.json: {message}", lambda: coco_stills(coco, "val")[0].masks(0))


def test_errors_of_coco(coco):
    path = coco / "instances.json"
    check("has neither instances.json nor annotations/instances_val.json", lambda: coco_stills(coco / "images", "val"))
    for content, message in (
        ([], "is not COCO's instance format"),
        ({"images": []}, "is not COCO's instance format"),
        ({"images": [], "annotations": [{}]}, "is not COCO's instance format"),
        ({"images": [], "annotations": [1]}, "is not COCO's instance format"),
        ("{", "is not valid JSON"),
        ({"images": [], "annotations": []}, "has no annotated pictures"),
    ):
        save(path, content)
        check(f"instances.json: {message}", lambda: coco_stills(coco, "val"))
    save(path, coco_json([BOX]))
    (coco / "images/1.png").rename(coco / "images/0.png")
    check(r"images/1.png: is missing, but .*instances.json annotates it \(1 missing", lambda: coco_stills(coco, "val"))
    (coco / "images").rename(coco / "pictures")
    check("images: is missing, it should hold the pictures of .*instances.json", lambda: coco_stills(coco, "val"))


def test_sa1b(tmp_path):
    for i in (1, 2):
        save(tmp_path / f"sa_000/sa_{i}.jpg", PICTURE)
        save(tmp_path / f"sa_000/sa_{i}.json", {"image": {}, "annotations": [{"segmentation": rle(MASK)}] * i})
    one, two = sa1b_stills(tmp_path)
    assert one.name == "sa_1" and list(two.masks(0)) == [1, 2]
    np.testing.assert_array_equal(one.masks(0)[1], MASK)
    save(tmp_path / "sa_000/sa_1.json", {"masks": 1})
    check("sa_1.json: is not SA-1B's format", lambda: one.masks(0))
    (tmp_path / "sa_000/sa_2.jpg").unlink()
    check("sa_2.jpg: is missing, but sa_2.json annotates it", lambda: sa1b_stills(tmp_path))
    check("nowhere: has no annotated pictures", lambda: sa1b_stills(tmp_path / "nowhere"))


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    for i in (1, 2, 3):
        save(tmp_path / f"images/train2017/{i}.jpg", PICTURE)
    shares = " ".join(str(x / side) for x, side in zip(BOX, (30, 20) * 4, strict=True))
    save(tmp_path / "labels/train2017/1.txt", f"0 {shares}\n44 0 0 1 0 1 1 0 1\n")
    save(tmp_path / "labels/train2017/2.txt", "")
    return tmp_path


def test_yolo_polygons(yolo, caplog):
    (still,) = yolo_stills(yolo, "train")
    assert [s.name for s in yolo_stills(yolo, "train2017")] == [still.name] == ["1"]
    np.testing.assert_array_equal(still.masks(0)[1], MASK)
    assert still.masks(0)[2].all()
    assert not caplog.records
    (yolo / "images/train2017/3.jpg").unlink()
    save(yolo / "labels/train2017/3.txt", "0 0 0 1 0 1 1\n")
    yolo_stills(yolo, "train")
    assert "1 label files have no picture and are left out (3.txt" in caplog.text


def test_errors_of_yolo(yolo):
    check("images: has no split 'val'; there is train2017", lambda: yolo_stills(yolo, "val"))
    (still,) = yolo_stills(yolo, "train")
    for text, message in (
        ("0 0.1 0.2 x", "line 1: is not a class and pairs of coordinates"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "line 1: is not a class and pairs of coordinates"),
        ("0 0 0 1 0 1 1\n0 0.5 0.5 0.2 0.2", "line 2: has 2 points, a polygon needs 3; boxes are not masks"),
        ("0 1 2 30 40 50 60", "line 1: coordinates must lie in 0..1"),
        ("0 nan 0 1 0 1 1", "line 1: coordinates must lie in 0..1"),
    ):
        save(yolo / "labels/train2017/1.txt", text)
        check(f"1.txt, {message}", lambda: still.masks(0))
    save(yolo / "labels/train2017/1.txt", "")
    check("labels/train2017: has no annotated pictures", lambda: yolo_stills(yolo, "train"))


def test_instance_pngs(tmp_path):
    for name in ("a", "unlabelled"):
        save(tmp_path / f"images/{name}.jpg", PICTURE)
    masks = tmp_path / "instance_png"
    check("instance_png: has no annotated pictures", lambda: instance_png_stills(tmp_path))
    ids = MASK * np.uint8(3)
    ids[0, 0] = 7
    save(masks / "a.png", ids)
    (still,) = instance_png_stills(tmp_path)
    assert list(still.masks(0)) == [3, 7]
    np.testing.assert_array_equal(still.masks(0)[3], MASK)
    save(masks / "a.png", ids[:5])
    check("instance_png/a.png: is 5x30 .* expected 20x30", lambda: still.masks(0))
    save(masks / "a.png", ids.astype(np.uint16) * 100)
    assert list(still.masks(0)) == [300, 700]
    save(masks / "b.png", ids)
    check("instance_png/b.png: is a mask without its picture", lambda: instance_png_stills(tmp_path))


def test_real_stills_agree_with_their_instance_pngs(data_root):
    polygons = {still.name: still for still in coco_stills(data_root / "coco_stills", "val")}
    indexed = {still.name: still for still in instance_png_stills(data_root / "coco_stills")}
    assert len(polygons) == 66 and set(polygons) == set(indexed)
    for name in sorted(polygons)[::8]:
        ours, theirs = (np.any(list(s[name].masks(0).values()), axis=0) for s in (polygons, indexed))
        assert (ours & ~theirs).mean() < 0.005 and ours.any(), name  # the index masks show crowds as well
    stills = yolo_stills(data_root / "coco128_seg", "train")
    assert len(stills) == 126 and len(instance_png_stills(data_root / "dsb2018_cc0")) == 60
    for still in stills[:20]:
        assert all(mask.shape == still.size and mask.any() for mask in still.masks(0).values())
