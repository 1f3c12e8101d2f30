"""Masks on disk: both layouts score as the masks do, mistakes are named, and files are written whole or not at all."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.errors import UserError
from qsam2.evaluation.mask_files import PALETTE, check_masks_folder, score_folders, write_masks
from qsam2.evaluation.metrics.scores import VOSScore
from qsam2.recipe.recipe import EvaluateRecipe

FRAMES, HEIGHT, WIDTH = 5, 20, 30


def write(path: Path, ids: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def id_map(seed: int, objects: int) -> np.ndarray:
    """Frames (T, H, W) in which each object is a rectangle, none covers another."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for t, i in np.ndindex(FRAMES, objects):
        y, x = rng.integers(0, 8), 10 * i + rng.integers(0, 3)
        frames[t, y : y + 9, x : x + 6] = i + 1
    return frames


MAPS = {  # predicted and true ids; swan lacks predictions of objects 2 and 3
    "davis": {"bear": (id_map(0, 2), id_map(1, 2)), "swan": (id_map(2, 1), id_map(3, 3))},
    "sav": {"sav_1": (id_map(0, 2), id_map(1, 2)), "sav_2": (id_map(4, 1), id_map(5, 1))},
}


def write_folders(root: Path, protocol: str) -> tuple[Path, Path]:
    for name, both in MAPS[protocol].items():
        for folder, frames in zip(("pred", "gt"), both, strict=True):
            for t, ids in enumerate(frames):
                if protocol == "davis":
                    write(root / folder / name / f"{t:05d}.png", ids, palette=True)
                    continue
                for item in range(int(both[1].max())):
                    write(root / folder / name / f"{item:03d}" / f"{4 * t:05d}.png", 255 * (ids == item + 1))
    return root / "pred", root / "gt"


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_folders_score_as_masks(tmp_path: Path, protocol: str) -> None:
    pred, gt = write_folders(tmp_path, protocol)
    metric = VOSScore(protocol)
    for name, (p, g) in MAPS[protocol].items():
        for item in range(1, g.max() + 1):
            metric.update(name, item if protocol == "davis" else f"{item - 1:03d}", p == item, g == item)
    found = score_folders(str(pred), str(gt), protocol)
    assert found == metric.compute()
    if protocol == "davis":
        assert found["per_object"]["swan"].keys() == {"1", "2", "3"}
        assert found["per_object"]["swan"]["3"]["J&F"] == 0


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_what_is_not_scored_needs_no_prediction_and_void_is_background(tmp_path: Path, protocol: str) -> None:
    pred, gt = write_folders(tmp_path, protocol)
    expected = score_folders(pred, gt, protocol)
    for folder in gt.iterdir() if protocol == "davis" else gt.glob("*/*"):
        files = sorted((pred / folder.relative_to(gt)).iterdir())
        files[0].unlink()
        files[-1].unlink()
        write(files[0].parent / "00001_extra.png", np.ones((3, 3)))  # frames without annotation are left out
    for path in gt.glob("*/*.png"):  # of davis
        ids = np.array(Image.open(path))
        ids[-1, ids[-1] == 0] = 255
        write(path, ids)
    found = score_folders(pred, gt, protocol)
    assert found | {"left_out": {}} == expected
    assert found["left_out"] == {name: ["1 predicted frame without a true one: 00001_extra"] for name in MAPS[protocol]}


TRUE = id_map(1, 2)
PRED = np.roll(TRUE, 1, axis=2)  # a column off: F is 1


def write_all(folder: Path, names: Sequence[str], frames: np.ndarray) -> None:
    for name, ids in zip(names, frames, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(folder / name)


def score(root: Path, protocol: str = "davis") -> dict[str, Any]:
    return score_folders(root / "pred", root / "gt", protocol)


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, Any]:
    """Block of the two objects of TRUE and PRED in sequence `a`."""
    for folder, frames in (("pred", PRED), ("gt", TRUE)):
        write_all(tmp_path / "plain" / folder / "a", [f"{t:05d}.png" for t in range(FRAMES)], frames)
    return score(tmp_path / "plain")


@pytest.mark.parametrize(
    "names",
    [
        [f"{t}.png" for t in range(8, 8 + FRAMES)],
        [f"{t:05d}.PNG" for t in range(FRAMES)],
        [f"frame_{t}.png" for t in range(8, 8 + FRAMES)],
        [f"{t:05d}.tif" for t in range(FRAMES)],
    ],
)
def test_files_are_in_the_order_of_their_numbers(tmp_path: Path, names: list[str], expected: dict[str, Any]) -> None:
    write_all(tmp_path / "gt/a", names, TRUE)
    write_all(tmp_path / "pred/a", [Path(name).stem + ".png" for name in names], PRED)
    assert score(tmp_path) == expected


def test_gaps_in_ids_are_no_objects(tmp_path: Path, expected: dict[str, Any]) -> None:
    names, ids = [f"{t}.png" for t in range(FRAMES)], np.array([0, 5, 9], np.uint8)
    write_all(tmp_path / "gt/a", names, ids[TRUE])
    write_all(tmp_path / "pred/a", names, ids[PRED])
    found = score(tmp_path)
    assert list(found["per_object"]["a"]) == ["5", "9"]
    assert list(found["per_object"]["a"].values()) == list(expected["per_object"]["a"].values())


@pytest.mark.parametrize("black_and_white", ["pred", "gt", "both"])
def test_masks_of_0_and_255_are_one_object(tmp_path: Path, black_and_white: str) -> None:
    names, one = [f"{t}.png" for t in range(FRAMES)], {"gt": TRUE == 1, "pred": PRED == 1}
    for folder, masks in one.items():
        white = 255 if black_and_white in (folder, "both") else 1
        write_all(tmp_path / folder / "a", names, np.uint8(white) * masks)
    metric = VOSScore("davis")
    metric.update("a", 1, one["pred"], one["gt"])
    assert score(tmp_path) == metric.compute()


def test_what_systems_leave_between_files_is_no_mask(tmp_path: Path, expected: dict[str, Any]) -> None:
    shutil.copytree(tmp_path / "plain", tmp_path / "x")
    for folder in ("x/pred", "x/gt", "x/pred/a", "x/gt/a"):
        for name in ("Thumbs.db", ".DS_Store", "._00001.png", "desktop.ini"):
            (tmp_path / folder / name).write_bytes(b"\0\5\x16\7")
        (tmp_path / folder / "__MACOSX").mkdir()
    assert score(tmp_path / "x") == expected


@pytest.mark.parametrize("first", [1, 2, 3])
def test_an_object_that_comes_later_is_scored_from_there(tmp_path: Path, first: int) -> None:
    """Also where no object is in the first frame; in the last but one there is nothing left to score."""
    names, late = [f"{t}.png" for t in range(FRAMES)], TRUE.copy()
    late[:first][late[:first] == 2] = 0
    write_all(tmp_path / "gt/a", names, late)
    write_all(tmp_path / "pred/a", names, PRED)
    metric = VOSScore("davis")
    for item in (1, 2):
        metric.update("a", item, item == PRED, late == item)
    found = score(tmp_path)
    assert found == metric.compute() and found["scored"]["objects"] == (2 if first < 3 else 1)
    only = np.where(late == 2, 1, 0).astype(np.uint8)
    write_all(tmp_path / "only/gt/a", names, only)
    write_all(tmp_path / "only/pred/a", names, np.where(PRED == 2, 1, 0).astype(np.uint8))
    if first < 3:
        alone = score(tmp_path / "only")["per_object"]["a"]["1"]
        assert alone == found["per_object"]["a"]["2"]
    else:
        with pytest.raises(
            UserError, match="no object was scored.*a: object 1 is seen first in annotated frame 4 of 5"
        ):
            score(tmp_path / "only")


def test_predicted_objects_that_sav_has_not_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pred, gt = write_folders(tmp_path, "sav")
    expected = score_folders(pred, gt, "sav")
    shutil.copytree(pred / "sav_1/001", pred / "sav_1/002")
    found = score_folders(pred, gt, "sav")
    assert found["left_out"] == {"sav_1": ["1 predicted object without true masks: 002"]}
    assert found | {"left_out": {}} == expected
    assert "not scored: sav_1: 1 predicted object without true masks: 002" in caplog.text


def test_ids_from_255_on_are_written_in_16_bits(tmp_path: Path) -> None:
    masks = {(VIDEO.name, 1000): np.packbits(RIGHT), (VIDEO.name, 1): np.packbits(LEFT)}
    write_masks(tmp_path / "m", [VIDEO], masks, EvaluateRecipe(frames=2))
    with Image.open(tmp_path / "m" / VIDEO.name / f"{VIDEO.frame_names[1]}.png") as picture:
        ids = np.array(picture)
    assert (ids[:, :50] == 1).all() and (ids[:, 50:] == 1000).all()


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / old).rename(root / new) and None


def put(path: str, ids: np.ndarray) -> Callable[[Path], None]:
    return lambda root: write(root / path, ids)


def keep_bytes(path: str, count: int) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:count]) and None


def empty(folder: str) -> Callable[[Path], None]:
    def break_it(root: Path) -> None:
        for path in (root / folder).iterdir():
            path.rename(root / f"{path.parent.name}-{path.name}")

    return break_it


def blank(folder: str) -> Callable[[Path], None]:
    return lambda root: [write(path, PLAIN) for path in (root / folder).iterdir()] and None


PLAIN = np.zeros((HEIGHT, WIDTH))
DAVIS, SAV = "pred/bear/00002.png", "pred/sav_1/001/00008.png"
DAVIS_MISTAKES = [
    (rename("gt", "truth"), ["gt: no such folder"]),
    (rename("pred", "out"), ["pred: no such folder"]),
    (empty("gt"), ["gt: no sequence folders", "SEQUENCE/FRAME.png"]),
    (empty("gt/bear"), ["gt/bear: no PNG files", "SEQUENCE/FRAME.png"]),
    (empty("pred/bear"), ["pred/bear/00001.png: missing"]),
    (rename("pred/bear", "bear"), ["pred: no predictions for bear"]),
    (rename("gt/bear", "bear"), ["pred: bear not in ground truth"]),
    (rename(DAVIS, "pred/bear/2.png"), [f"{DAVIS}: missing", "first and last"]),
    (put(DAVIS, PLAIN + 3), [f"{DAVIS}: object id 3", "the masks in gt/bear have 1, 2"]),
    (put(DAVIS, PLAIN[1:]), [f"{DAVIS}: 30x19 pixels", "30x20 pixels", "nothing is resized"]),
    (put("gt/bear/00002.png", PLAIN[1:]), ["gt/bear/00002.png: 30x19 pixels", "gt/bear/00000.png is 30x20 pixels"]),
    (blank("gt/bear"), ["gt/bear: no object in any mask", "255 is void"]),
    (put(DAVIS, np.arange(3) + np.zeros((HEIGHT, WIDTH, 3))), [f"{DAVIS}: a mask picture", "palette", "RGB"]),
    (put("gt/bear/00002.webp", PLAIN), ["gt/bear/00002.png: is there again as 00002.webp"]),
    (keep_bytes(DAVIS, 3), [f"{DAVIS}: cannot be read as a picture"]),
    (keep_bytes("gt/bear/00002.png", 60), ["gt/bear/00002.png: cannot be read as a picture"]),
]
SAV_MISTAKES = [
    (empty("gt/sav_1"), ["gt/sav_1: no object folders", "SEQUENCE/OBJECT/FRAME.png"]),
    (empty("gt/sav_1/001"), ["gt/sav_1/001: no PNG files", "SEQUENCE/OBJECT/FRAME.png"]),
    (rename("pred/sav_1/001", "pred/sav_1/1"), ["pred/sav_1/001/00004.png: missing"]),
    (put(SAV, PLAIN.T), [f"{SAV}: 20x30 pixels", "30x20 pixels"]),
    (put("gt/sav_1/001/00008.png", np.arange(600).reshape(20, 30) % 3), ["00008.png: more than one object"]),
    (rename("pred/sav_2", "sav_2"), ["pred: no predictions for sav_2"]),
]
MISTAKES = [("davis", *row) for row in DAVIS_MISTAKES] + [("sav", *row) for row in SAV_MISTAKES]


@pytest.mark.parametrize(("protocol", "mistake", "parts"), MISTAKES, ids=[parts[0] for *_, parts in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, protocol: str, mistake: Callable[[Path], None], parts: list[str]) -> None:
    pred, gt = write_folders(tmp_path, protocol)
    mistake(tmp_path)
    with pytest.raises(UserError) as caught:
        score_folders(pred, gt, protocol)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in message and all(part in message for part in parts), message


VIDEO = moving_objects("val", 1, size=(64, 96))[0]
LEFT, RIGHT = np.zeros((2, 2, *VIDEO.size), bool)
LEFT[:, :, :50] = True
RIGHT[:, :, 40:] = True
BOTH = {(VIDEO.name, 2): np.packbits(RIGHT), (VIDEO.name, 1): np.packbits(LEFT), ("other", 3): np.packbits(LEFT)}


@pytest.mark.parametrize("order", [1, -1])
def test_the_lowest_id_has_a_shared_pixel(tmp_path: Path, order: int) -> None:
    write_masks(tmp_path / "m", [VIDEO], dict(list(BOTH.items())[::order]), EvaluateRecipe(frames=2))
    files = sorted((tmp_path / "m").rglob("*.png"))
    assert files == [tmp_path / "m" / VIDEO.name / f"{name}.png" for name in VIDEO.frame_names[:2]]
    with Image.open(files[1]) as picture:
        assert picture.mode == "P" and picture.getpalette()[:9] == PALETTE[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        ids = np.array(picture)
    assert (ids[:, :50] == 1).all() and (ids[:, 50:] == 2).all()


def test_objects_of_sav_keep_their_pixels(tmp_path: Path) -> None:
    write_masks(tmp_path / "m", [VIDEO], BOTH, EvaluateRecipe(frames=2, protocol="sav"))
    for folder, mask in (("000", LEFT), ("001", RIGHT)):
        with Image.open(tmp_path / "m" / VIDEO.name / folder / f"{VIDEO.frame_names[1]}.png") as picture:
            assert (np.array(picture) == mask[1]).all()


def test_nothing_is_left_of_masks_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/m could not be written: .*; make room or give another path"):
        write_masks(tmp_path / "file" / "m", [VIDEO], BOTH, EvaluateRecipe(frames=2))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_masks_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    video = copy.copy(VIDEO)
    video.name = name
    with pytest.raises(UserError, match=f"a video is called '{name}', which is no folder's name"):
        check_masks_folder(tmp_path / "m", [video])


def test_an_object_that_is_never_seen_needs_no_predictions(tmp_path: Path) -> None:
    """The model's masks are without it, as no mask prompts it."""
    pred, gt = write_folders(tmp_path, "sav")
    expected = score_folders(pred, gt, "sav")
    for index in range(FRAMES):
        write(gt / f"sav_1/007/{4 * index:05d}.png", np.zeros((HEIGHT, WIDTH)))
    block = score_folders(pred, gt, "sav")
    assert block["J&F"] == expected["J&F"]
    assert block["left_out"]["sav_1"] == ["object 007 is in no true mask between the first and the last"]
