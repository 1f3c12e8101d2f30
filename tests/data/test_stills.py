"""Stills with instances: COCO, SA-1B, YOLO, instance PNGs; what is read, and the one-line error for each mistake."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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


IDS = MASK * np.uint8(3)
IDS[0, 0] = 7
POLYGON = " ".join(str(x / side) for x, side in zip(BOX, (30, 20) * 4, strict=True))
FILES = {
    "coco/images/1.png": PICTURE,
    "coco/images/2.png": PICTURE,
    "coco/instances.json": coco_json([BOX], rle(MASK), rle(~MASK), crowd=2),
    "sa1b/sa_000/sa_1.jpg": PICTURE,
    "sa1b/sa_000/sa_1.json": {"image": {}, "annotations": [{"segmentation": rle(MASK)}] * 2},
    "yolo/images/train2017/1.jpg": PICTURE,
    "yolo/images/train2017/2.jpg": PICTURE,
    "yolo/images/train2017/3.jpg": PICTURE,
    "yolo/labels/train2017/1.txt": f"0 {POLYGON}\n44 0 0 1 0 1 1 0 1\n",
    "yolo/labels/train2017/2.txt": "",
    "instance_png/images/a.jpg": PICTURE,
    "instance_png/images/unlabelled.jpg": PICTURE,
    "instance_png/instance_png/a.png": IDS,
}
READERS = {
    "coco": lambda root: coco_stills(root, "val"),
    "sa1b": sa1b_stills,
    "yolo": lambda root: yolo_stills(root, "train"),
    "instance_png": instance_png_stills,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, content in FILES.items():
        save(tmp_path / path, content)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name", "ids"),
    [("coco", "1", [1, 2]), ("sa1b", "sa_1", [1, 2]), ("yolo", "1", [1, 2]), ("instance_png", "a", [3, 7])],
)
def test_the_one_annotated_picture_of_each_kind(root, kind, name, ids, caplog):
    caplog.set_level("WARNING", "qsam2")
    (still,) = READERS[kind](root / kind)  # crowds, and pictures without instances, are left out
    assert (still.name, still.frame_names, still.size, len(still)) == (name, [name], SIZE, 1)
    np.testing.assert_array_equal(still.frame(0), PICTURE)
    assert list(still.masks(0)) == ids and not caplog.records
    np.testing.assert_array_equal(still.masks(0)[ids[0]], MASK)


def test_second_instances(root):
    second = {kind: list(READERS[kind](root / kind)[0].masks(0).values())[1] for kind in ("coco", "yolo")}
    np.testing.assert_array_equal(second["coco"], MASK)
    assert second["yolo"].all()


def test_the_layouts_of_the_full_coco(tmp_path, root):
    save(tmp_path / "val2017/1.png", PICTURE)
    save(tmp_path / "annotations/instances_val2017.json", coco_json([BOX]))
    for split in ("val", "val2017"):
        assert [still.name for still in coco_stills(tmp_path, split)] == ["1"]
    assert [still.name for still in yolo_stills(root / "yolo", "train2017")] == ["1"]


def test_polygons_are_united_and_those_without_area_ignored(root):
    line = [1, 1, 2, 2]
    save(root / "coco/instances.json", coco_json([BOX, [20, 2, 24, 2, 24, 6, 20, 6], line], [line]))
    masks = READERS["coco"](root / "coco")[0].masks(0)
    np.testing.assert_array_equal(masks[1], MASK | box(SIZE, 2, 20, 4, 4))
    assert not masks[2].any()


@pytest.mark.parametrize(
    ("name", "place", "still"),
    [
        ("a/1.png", "images/a/1.png", "1"),  # from the folder of the pictures
        ("images/a/1.png", "images/a/1.png", "1"),  # from the dataset's folder
        ("val2017/1.png", "val2017/1.png", "1"),
        ("val2017/1.png", "images/val2017/1.png", "1"),
        ("./3.png", "images/3.png", "3"),
    ],
)
def test_coco_names_with_a_folder(root: Path, name: str, place: str, still: str) -> None:
    save(root / "coco" / place, PICTURE)
    save(root / COCO, {"images": [{"id": 1, "file_name": name}], "annotations": coco_json([BOX])["annotations"]})
    (picture,) = READERS["coco"](root / "coco")
    assert picture.name == still
    np.testing.assert_array_equal(picture.frame(0), PICTURE)
    np.testing.assert_array_equal(picture.masks(0)[1], MASK)


def test_pictures_of_one_name_in_two_folders_have_two_names(root: Path) -> None:
    content = coco_json([BOX], [BOX])
    for number, folder in enumerate("ab"):
        save(root / f"coco/images/{folder}/1.png", PICTURE + number)
        content["images"][number]["file_name"] = f"{folder}/1.png"
        content["annotations"][number]["image_id"] = number + 1
    save(root / COCO, content)
    stills = READERS["coco"](root / "coco")
    assert [still.name for still in stills] == ["a-1.png", "b-1.png"]
    assert [int(still.frame(0)[0, 0, 0]) for still in stills] == [77, 78]


@pytest.mark.parametrize(
    "name", ["../outside.png", "a/../../../outside.png", "/etc/passwd", "..", "images/../../x.png"]
)
def test_coco_names_do_not_leave_the_dataset(root: Path, name: str) -> None:
    save(root / "outside.png", PICTURE)
    (root / "coco/images/a").mkdir()
    save(root / COCO, {"images": [{"id": 1, "file_name": name}], "annotations": coco_json([BOX])["annotations"]})
    check("names the picture .*, outside of .*coco; give names within it", lambda: READERS["coco"](root / "coco"))


@pytest.mark.parametrize("name", ["", ".", "x" * 5000, "a\0b", "\ud800", "images"])
def test_coco_names_that_no_picture_has(root: Path, name: str) -> None:
    save(root / COCO, {"images": [{"id": 1, "file_name": name}], "annotations": coco_json([BOX])["annotations"]})
    check("is missing, but .*instances.json annotates it", lambda: READERS["coco"](root / "coco"))


@pytest.mark.parametrize(
    "polygon",
    [
        [math.nan, *BOX[1:]], [math.inf, *BOX[1:]], [-math.inf, *BOX[1:]], [4e8, *BOX[1:]], [-4.5e8, *BOX[1:]],
        [1e300, *BOX[1:]], [10**30, *BOX[1:]], [10**400, *BOX[1:]], [331, *BOX[1:]], [True, *BOX[1:]], [None, *BOX[1:]],
        ["4", *BOX[1:]], [[4], *BOX[1:]], {"a": 1}, "444444", 4, None, [0, 0, 300, 0, 300, 300, 0, 300] * 5000,
    ],
)  # fmt: skip
def test_polygons_that_would_kill_the_process_are_one_line(root: Path, polygon: Any) -> None:
    """pycocotools casts corners to 32-bit integers and reserves memory by their distance."""
    save(root / COCO, coco_json([BOX, polygon]))
    check("instances.json: holds a malformed polygon", lambda: READERS["coco"](root / "coco")[0].masks(0))


def test_polygons_may_reach_over_the_edge(root: Path) -> None:
    save(root / COCO, coco_json([[-20.5, -1e2, 60, -1e2, 60, 1e2, -20.5, 1e2]]))
    assert READERS["coco"](root / "coco")[0].masks(0)[1].all()
    save(root / COCO, coco_json([[0, 0, 330, 0, 0, 330]]))  # a triangle of ten sides more than the longer one
    assert READERS["coco"](root / "coco")[0].masks(0)[1].all()


@pytest.mark.parametrize(
    "counts",
    [
        [2**63 - 1, 2**63 - 1, 602], [2**62] * 4 + [600], [2**64 - 1, 601], [10**30, 1], [-1, 601], [600.0],
        [True, 599], [[300, 300]], [1, [599]], [], "P" * 13 + "0", "o" * 20 + "0h5", "h5\u00e9", "\ud800",
        {"a": 1}, 600, None,
    ],
)  # fmt: skip
def test_run_lengths_whose_sum_wraps_around_are_one_line(root: Path, counts: Any) -> None:
    save(root / COCO, coco_json({"size": SIZE, "counts": counts}))
    check("instances.json: holds a malformed run-length code", lambda: READERS["coco"](root / "coco")[0].masks(0))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_yolo_labels_as_people_have_them(root: Path, encoding: str) -> None:
    """Blank lines, and coordinates that rounding has moved over the edge."""
    text = f"\n0 {POLYGON}\r\n  \n44.0 -0.0004 0 1.000001 0 1 1 0 1\n\n"
    save(root / YOLO, text.encode(encoding))
    save(root / "yolo/labels/train2017/2.txt", " \n\n".encode(encoding))  # has no objects, as an empty file
    (still,) = READERS["yolo"](root / "yolo")
    masks = still.masks(0)
    assert list(masks) == [1, 2] and masks[2].all()
    np.testing.assert_array_equal(masks[1], MASK)


def test_labels_without_a_picture_are_left_out_with_a_warning(root, caplog):
    save(root / "yolo/labels/train2017/4.txt", "0 0 0 1 0 1 1\n")
    assert len(yolo_stills(root / "yolo", "train")) == 1
    assert "1 label files have no picture and are left out (4.txt" in caplog.text


def test_instance_pngs_may_have_16_bits(root):
    save(root / "instance_png/instance_png/a.png", IDS.astype(np.uint16) * 100)
    assert list(instance_png_stills(root / "instance_png")[0].masks(0)) == [300, 700]


COCO, YOLO, PNG = "coco/instances.json", "yolo/labels/train2017/1.txt", "instance_png/instance_png"


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (
            COCO,
            coco_json([[1, 2, 3, 4, 5, 6, 7]]),
            "instances.json: holds a malformed polygon .*coordinate lacks its pair",
        ),
        (COCO, coco_json([["a", "b", "c", "d", "e", "f"]]), "instances.json: holds a malformed polygon"),
        (COCO, coco_json(5), "instances.json is not COCO's instance format"),
        (COCO, coco_json({"size": SIZE, "counts": [1, 2]}), "json: holds a malformed run-length code .*20x30"),
        (COCO, coco_json(rle(np.ones((5, 5), bool))), "instances.json: has a mask of 5x5"),
        (COCO, [], "instances.json is not COCO's instance format"),
        (COCO, {"images": []}, "instances.json is not COCO's instance format"),
        (COCO, {"images": [], "annotations": [{}]}, "instances.json is not COCO's instance format"),
        (COCO, {"images": [], "annotations": [1]}, "instances.json is not COCO's instance format"),
        (COCO, "{", "instances.json is not COCO's instance format .not valid JSON"),
        (COCO, {"images": [], "annotations": []}, "instances.json: has no annotated pictures"),
        (COCO, None, "coco: has neither instances.json nor annotations/instances_val.json"),
        ("coco/images/1.png", None, r"1.png: is missing, but .*instances.json annotates it \(1 missing"),
        ("coco/images", None, "images: is missing, it should hold the pictures of .*instances.json"),
        ("sa1b/sa_000/sa_1.json", {"masks": 1}, "sa_1.json is not SA-1B's format"),
        ("sa1b/sa_000/sa_1.jpg", None, "sa_1.jpg: is missing, but sa_1.json annotates it"),
        ("sa1b/sa_000/sa_1.json", None, "sa1b: has no annotated pictures"),
        (YOLO, "0 0.1 0.2 x", "1.txt, line 1: is not a class and pairs of coordinates"),
        (YOLO, "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "1.txt, line 1: is not a class and pairs of coordinates"),
        (
            YOLO,
            "0 0 0 1 0 1 1\n0 0.5 0.5 0.2 0.2",
            "1.txt, line 2: has 2 points, a polygon needs 3; boxes are not masks",
        ),
        (YOLO, "0 1 2 30 40 50 60", "1.txt, line 1: coordinates must lie in 0..1"),
        (YOLO, "0 nan 0 1 0 1 1", "1.txt, line 1: coordinates must lie in 0..1"),
        (YOLO, "0 1.01 0 1 0 1 1", "1.txt, line 1: coordinates must lie in 0..1"),
        (YOLO, "0 inf 0 1 0 1 1", "1.txt, line 1: coordinates must lie in 0..1"),
        (YOLO, "\n0 0,1 0 1 0 1 1", "1.txt, line 2: is not a class and pairs of coordinates"),
        (YOLO, "0.5 0.1 0.2 0.3 0.4 0.5 0.6", "1.txt, line 1: is not a class and pairs of coordinates"),
        (YOLO, b"\x89PNG\r\n\x1a\n\0\0", "1.txt is no text"),
        (YOLO, "", "labels/train2017: has no annotated pictures"),
        ("yolo/images/train2017", None, "images: has no split 'train'; there is away"),
        (f"{PNG}/a.png", IDS[:5], "instance_png/a.png: is 5x30 .* expected 20x30"),
        (f"{PNG}/b.png", IDS, "instance_png/b.png: is a mask without its picture"),
        (f"{PNG}/a.png", None, "instance_png: has no annotated pictures"),
    ],
)
def test_errors(root, path, content, message):
    """One file is added, replaced or taken away; then everything is opened and read."""
    if content is None:
        (root / path).rename((root / path).with_name("away"))
    else:
        save(root / path, content)
    kind = path.split("/")[0]
    check(message, lambda: [(still.frame(0), still.masks(0)) for still in READERS[kind](root / kind)])


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


def test_ids_of_coco_that_contradict_each_other(tmp_path: Path, caplog) -> None:
    for name in ("1.png", "2.png"):
        save(tmp_path / "images" / name, PICTURE)
    content = coco_json([BOX])
    save(
        tmp_path / "instances.json",
        {**content, "annotations": [*content["annotations"], {"image_id": "1", "segmentation": [BOX]}]},
    )
    (still,) = coco_stills(tmp_path, "val")
    assert still.name == "1" and list(still.masks(0)) == [1]
    assert "annotations of 1 images that it does not list are left out ('1')" in caplog.text
    save(tmp_path / "instances.json", {**content, "images": [{"id": 1, "file_name": f"{i}.png"} for i in (1, 2)]})
    check("instances.json: has two images of the id 1; their annotations", lambda: coco_stills(tmp_path, "val"))
