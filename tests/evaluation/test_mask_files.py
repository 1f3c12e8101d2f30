"""Masks on disk: both layouts score as the masks do, mistakes are named, and files are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.errors import UserError
from qsam2.evaluation.mask_files import PALETTE, score_folders, write_masks
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
        write(files[0].parent / "00001_extra.png", np.ones((3, 3)))  # frames without annotation are not read
    for path in gt.glob("*/*.png"):  # of davis
        ids = np.array(Image.open(path))
        ids[-1, ids[-1] == 0] = 255
        write(path, ids)
    assert score_folders(pred, gt, protocol) == expected


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
    (put(DAVIS, PLAIN + 3), [f"{DAVIS}: object id 3", "00000.png has ids 1 to 2"]),
    (put(DAVIS, PLAIN[1:]), [f"{DAVIS}: 30x19 pixels", "30x20 pixels", "nothing is resized"]),
    (put("gt/bear/00002.png", PLAIN[1:]), ["gt/bear/00002.png: 30x19 pixels", "gt/bear/00000.png is 30x20 pixels"]),
    (put("gt/bear/00000.png", PLAIN + 255), ["gt/bear/00000.png: no object", "255 is void"]),
    (put(DAVIS, np.zeros((HEIGHT, WIDTH, 3))), [f"{DAVIS}: PNG of mode RGB", "palette"]),
    (keep_bytes(DAVIS, 3), [f"{DAVIS}: not a readable PNG"]),
    (keep_bytes("gt/bear/00002.png", 60), ["gt/bear/00002.png: not a readable PNG"]),
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
