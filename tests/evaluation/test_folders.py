"""Scoring folders: both layouts, and the message of every mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsam2.errors import UserError
from qsam2.evaluation.metrics.folders import score_folders
from qsam2.evaluation.metrics.vos import VOSScore

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
    for t in range(FRAMES):
        for i in range(objects):
            y, x = rng.integers(0, 8), 10 * i + rng.integers(0, 3)
            frames[t, y : y + 9, x : x + 6] = i + 1
    return frames


@pytest.fixture
def davis(tmp_path: Path) -> tuple[Path, Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    maps = {"bear": (id_map(0, 2), id_map(1, 2)), "swan": (id_map(2, 1), id_map(3, 3))}
    for name, both in maps.items():
        for folder, frames in zip(("pred", "gt"), both, strict=True):
            for t, ids in enumerate(frames):
                write(tmp_path / folder / name / f"{t:05d}.png", ids, palette=True)
    return tmp_path / "pred", tmp_path / "gt", maps


@pytest.fixture
def sav(tmp_path: Path) -> tuple[Path, Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    maps = {"sav_1": (id_map(0, 2), id_map(1, 2)), "sav_2": (id_map(4, 1), id_map(5, 1))}
    for name, both in maps.items():
        for folder, frames in zip(("pred", "gt"), both, strict=True):
            for t, object_id in np.ndindex(FRAMES, int(both[1].max())):
                path = tmp_path / folder / name / f"{object_id:03d}" / f"{4 * t:05d}.png"
                write(path, 255 * (frames[t] == object_id + 1))
    return tmp_path / "pred", tmp_path / "gt", maps


def test_davis_folders_score_as_masks(davis: tuple) -> None:
    pred, gt, maps = davis
    metric = VOSScore("davis")
    for name, (p, g) in maps.items():
        for object_id in range(1, g[0].max() + 1):  # swan lacks predictions of objects 2 and 3
            metric.update(name, object_id, p == object_id, g == object_id)
    found = score_folders(pred, gt, "davis")
    assert found == metric.compute()
    assert set(found["per_object"]["swan"]) == {"1", "2", "3"}
    assert found["per_object"]["swan"]["3"]["J&F"] == 0


def test_sav_folders_score_as_masks(sav: tuple) -> None:
    pred, gt, maps = sav
    metric = VOSScore("sav")
    for name, (p, g) in maps.items():
        for object_id in range(g.max()):
            metric.update(name, f"{object_id:03d}", p == object_id + 1, g == object_id + 1)
    assert score_folders(str(pred), str(gt), "sav") == metric.compute()


def test_void_is_background(davis: tuple) -> None:
    pred, gt, _ = davis
    expected = score_folders(pred, gt, "davis")
    for path in gt.glob("*/*.png"):
        ids = np.array(Image.open(path))
        ids[-1, ids[-1] == 0] = 255
        write(path, ids)
    assert score_folders(pred, gt, "davis") == expected


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_what_is_not_scored_needs_no_prediction(protocol: str, request: pytest.FixtureRequest) -> None:
    pred, gt, _ = request.getfixturevalue(protocol)
    expected = score_folders(pred, gt, protocol)
    for sequence in gt.iterdir():
        for folder in [sequence] if protocol == "davis" else sequence.iterdir():
            files = sorted((pred / folder.relative_to(gt)).iterdir())
            files[0].unlink()
            files[-1].unlink()
            write(files[0].parent / "00001_extra.png", np.ones((3, 3)))  # frames without annotation are not read
    assert score_folders(pred, gt, protocol) == expected


def test_one_split_of_the_sequences(davis: tuple) -> None:
    pred, gt, _ = davis
    everything = score_folders(pred, gt, "davis")
    found = score_folders(pred, gt, "davis", sequences=["swan"])
    assert found["per_object"] == {"swan": everything["per_object"]["swan"]}


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / old).rename(root / new) and None


def put(path: str, ids: np.ndarray) -> Callable[[Path], None]:
    return lambda root: write(root / path, ids)


def put_bytes(path: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes(data) and None


def truncate(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:60]) and None


def empty(folder: str) -> Callable[[Path], None]:
    def break_it(root: Path) -> None:
        for path in (root / folder).iterdir():
            path.rename(root / f"{path.parent.name}-{path.name}")

    return break_it


plain = np.zeros((HEIGHT, WIDTH))

DAVIS_MISTAKES = [
    (rename("gt", "truth"), ["gt: no such folder"]),
    (rename("pred", "out"), ["pred: no such folder"]),
    (empty("gt"), ["gt: no sequence folders", "SEQUENCE/FRAME.png"]),
    (empty("gt/bear"), ["gt/bear: no PNG files", "SEQUENCE/FRAME.png"]),
    (empty("pred/bear"), ["pred/bear/00001.png: missing"]),
    (rename("pred/bear", "bear"), ["pred: no predictions for bear"]),
    (rename("gt/bear", "bear"), ["pred: bear not in ground truth"]),
    (rename("pred/bear/00002.png", "pred/bear/2.png"), ["pred/bear/00002.png: missing", "first and last"]),
    (put("pred/bear/00002.png", plain + 3), ["pred/bear/00002.png: object id 3", "00000.png has ids 1 to 2"]),
    (
        put("pred/bear/00002.png", plain[1:]),
        ["pred/bear/00002.png: 30x19 pixels", "30x20 pixels", "nothing is resized"],
    ),
    (put("gt/bear/00002.png", plain[1:]), ["gt/bear/00002.png: 30x19 pixels", "gt/bear/00000.png is 30x20 pixels"]),
    (put("gt/bear/00000.png", plain + 255), ["gt/bear/00000.png: no object", "255 is void"]),
    (put("pred/bear/00002.png", np.zeros((HEIGHT, WIDTH, 3))), ["pred/bear/00002.png: PNG of mode RGB", "palette"]),
    (put_bytes("pred/bear/00002.png", b"not an image"), ["pred/bear/00002.png: not a readable PNG"]),
    (truncate("gt/bear/00002.png"), ["gt/bear/00002.png: not a readable PNG"]),
]

SAV_MISTAKES = [
    (empty("gt/sav_1"), ["gt/sav_1: no object folders", "SEQUENCE/OBJECT/FRAME.png"]),
    (empty("gt/sav_1/001"), ["gt/sav_1/001: no PNG files", "SEQUENCE/OBJECT/FRAME.png"]),
    (rename("pred/sav_1/001", "pred/sav_1/1"), ["pred/sav_1/001/00004.png: missing"]),
    (put("pred/sav_1/001/00008.png", plain.T), ["pred/sav_1/001/00008.png: 20x30 pixels", "30x20 pixels"]),
    (
        put("gt/sav_1/001/00008.png", np.arange(600).reshape(20, 30) % 3),
        ["gt/sav_1/001/00008.png: more than one object"],
    ),
    (rename("pred/sav_2", "sav_2"), ["pred: no predictions for sav_2"]),
]


def check_mistake(folders: tuple, protocol: str, mistake: Callable[[Path], None], parts: list[str]) -> None:
    pred, gt, _ = folders
    mistake(pred.parent)
    with pytest.raises(UserError) as caught:
        score_folders(pred, gt, protocol)
    message = str(caught.value).replace(f"{pred.parent}/", "")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("mistake", "parts"), DAVIS_MISTAKES, ids=[parts[0] for _, parts in DAVIS_MISTAKES])
def test_davis_mistakes(davis: tuple, mistake: Callable[[Path], None], parts: list[str]) -> None:
    check_mistake(davis, "davis", mistake, parts)


@pytest.mark.parametrize(("mistake", "parts"), SAV_MISTAKES, ids=[parts[0] for _, parts in SAV_MISTAKES])
def test_sav_mistakes(sav: tuple, mistake: Callable[[Path], None], parts: list[str]) -> None:
    check_mistake(sav, "sav", mistake, parts)


def test_wrong_arguments(davis: tuple) -> None:
    pred, gt, _ = davis
    with pytest.raises(UserError, match="protocol: 'youtube' is unknown; choose one of davis, sav"):
        score_folders(pred, gt, "youtube")
    with pytest.raises(UserError, match="no ground truth for sequence cow; it has bear, swan"):
        score_folders(pred, gt, "davis", sequences=["bear", "cow"])
