"""`qsam2 predict`: what it writes, whole or not at all, and every mistake in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from messages import Message
from PIL import Image
from small_predictors import HEIGHT, WIDTH, pictures, square, write_folder, write_video

import qsam2
from qsam2.cli import main
from qsam2.data.index_masks import read_ids
from qsam2.report.overlays import COLOURS

LENGTH = 5
CLICK = ["--point", "20,20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("video") / "frames", pictures(LENGTH))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "photo.png"
    Image.fromarray(pictures(1)[0]).save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def write_mask(path: Path, ids: np.ndarray, mode: str = "P") -> str:
    Image.fromarray(ids.astype(np.uint8)).convert(mode).save(path)
    return str(path)


def run(model: Path | str, source: Path, out: Path, *words: str) -> None:
    assert main(["predict", str(model), str(source), *words, "--out", str(out)]) == 0


def read(path: Path) -> np.ndarray:
    with Image.open(path) as mask:
        assert mask.mode == "P"
        return np.array(mask)


def tracked(out: Path) -> list[np.ndarray]:
    return [read(path) for path in sorted((out / "masks").iterdir())]


def overlay_of(out: Path) -> tuple[list[np.ndarray], Fraction | None]:
    with av.open(str(out / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


# What it writes


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (CLICK, {"point_coords": np.array([[20.0, 20.0]]), "point_labels": np.array([1]), "multimask_output": True}),
        (
            [*CLICK, "--point", "60,5,0"],
            {"point_coords": np.array([[20.0, 20.0], [60, 5]]), "point_labels": np.array([1, 0])},
        ),
        (["--box", "8,12,30.5,30"], {"box": np.array([8, 12, 30.5, 30])}),
    ],
)
def test_a_picture_gets_the_mask_of_the_image_predictor(
    words: list[str], prompt: dict, models: dict[str, Path], picture: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    run(models["packed"], picture, out, *words)
    assert {path.name for path in out.iterdir()} == {"mask.png", "overlay.png"}
    assert capsys.readouterr().out.split() == [str(out / "mask.png"), str(out / "overlay.png")]
    predictor = qsam2.image_predictor(models["packed"])
    predictor.set_image(np.array(Image.open(picture)))
    masks, confidence, _ = predictor.predict(**{"multimask_output": False, **prompt})
    expected = masks[confidence.argmax()] > 0
    assert 0.01 < expected.mean() < 0.99 and np.array_equal(read(out / "mask.png"), expected)
    overlay = np.array(Image.open(out / "overlay.png")).astype(int)
    frame = np.array(Image.open(picture)).astype(int)
    assert np.array_equal((overlay != frame).any(axis=2) | (frame == COLOURS[0]).all(axis=2), expected)


def test_a_mask_of_a_picture_is_refined(picture: Path, out: Path, tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "mask.png", square() * 255, "L")
    run("nano", picture, out, "--mask", mask, "model.image_size=64")  # keys of the recipe are taken
    assert 0 < read(out / "mask.png").mean() < 1


def test_a_folder_is_tracked_as_by_the_video_predictor(models: dict[str, Path], folder: Path, out: Path) -> None:
    """Two objects, on their first frame and corrected on a later one; the surer one has the pixel."""
    words = ["--point", "20,20", "--frame", "2", "--point", "25,20", "--object", "7", "--frame", "0"]
    run(models["packed"], folder, out, *words, "--box", "40,5,70,40")
    assert {path.name for path in out.iterdir()} == {"masks", "overlay.mp4"}
    assert sorted(path.name for path in (out / "masks").iterdir()) == [f"{index}.png" for index in range(LENGTH)]
    model = qsam2.video_predictor(models["packed"])
    state = model.init_state(folder)
    model.add_new_points_or_box(state, 0, 1, points=[[20.0, 20.0]], labels=[1])
    model.add_new_points_or_box(state, 2, 1, points=[[25.0, 20.0]], labels=[1])
    model.add_new_points_or_box(state, 0, 7, box=[40.0, 5.0, 70.0, 40.0])
    found = tracked(out)
    for index, _, logits in model.propagate_in_video(state):
        first, second = logits[:, 0].numpy()
        expected = np.where(first >= second, 1, 7) * (np.maximum(first, second) > 0)
        assert np.array_equal(found[index], expected)
    assert {1, 7} <= set(np.unique(found))
    frames, rate = overlay_of(out)
    assert len(frames) == LENGTH and rate == 24
    assert frames[0].shape == (HEIGHT + 1, WIDTH + 1, 3)  # H.264 has even sides


def test_a_video_file_keeps_its_length_and_rate(models: dict[str, Path], out: Path, tmp_path: Path) -> None:
    run(models["float"], write_video(tmp_path / "clip.mp4", pictures(6, 46, 80), rate=12), out, *CLICK)
    assert sorted(path.name for path in (out / "masks").iterdir()) == [f"{index:05d}.png" for index in range(6)]
    frames, rate = overlay_of(out)
    assert len(frames) == 6 and rate == 12 and frames[0].shape == (46, 80, 3)
    ids = tracked(out)[0]
    inside = frames[0][ids > 0].mean(axis=0) - pictures(6, 46, 80)[0][ids > 0].mean(axis=0)
    assert inside[0] > 20  # tinted orange


def test_a_film_that_a_phone_held_upright_is_tracked_upright(
    models: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    """Filmed 80 wide and 46 high, shown turned: the click is given and the masks and the overlay come as it is seen."""
    film = write_video(tmp_path / "phone.mp4", pictures(3, 46, 80), degrees=-90)
    run(models["float"], film, out, "--point", "40,70")
    assert [mask.shape for mask in tracked(out)] == [(80, 46)] * 3
    frames, _ = overlay_of(out)
    lying = [frame.to_ndarray(format="rgb24") for frame in av.open(str(film)).decode(video=0)]
    for frame, expected, mask in zip(frames, lying, tracked(out), strict=True):
        assert frame.shape == (80, 46, 3)
        right, wrong = (np.abs(frame.astype(int) - np.rot90(expected, turns))[mask == 0].mean() for turns in (-1, 1))
        assert right < wrong / 2  # both codecs lose a little


def test_objects_are_tracked_both_ways_from_their_own_first_frames(
    models: dict[str, Path], folder: Path, out: Path, tmp_path: Path
) -> None:
    first, later = square() * 3, square(30) * 5
    words = ["--mask", write_mask(tmp_path / "first.png", first), "--frame", "3"]
    run(models["float"], folder, out, *words, "--mask", write_mask(tmp_path / "later.png", later))
    found = tracked(out)
    alone = []
    for words in (["--object", "3"], ["--object", "5", "--frame", "3"]):
        mask = tmp_path / ("first.png" if words[1] == "3" else "later.png")
        run(models["float"], folder, out, *words, "--mask", str(mask), "--force")
        alone.append(tracked(out))
    assert any((ids == 5).any() for ids in found[:3])  # before its prompt
    for ids, early, late in zip(found, *alone, strict=True):
        assert np.array_equal(ids, np.where(early > 0, early, late))  # what was prompted earlier keeps its pixels


def test_a_mask_of_several_ids_prompts_all_of_them(
    models: dict[str, Path], folder: Path, out: Path, tmp_path: Path
) -> None:
    ids = np.maximum(square() * 2, square(40) * 9)
    run(models["float"], folder, out, "--mask", write_mask(tmp_path / "ids.png", ids))
    assert set(np.unique(tracked(out)[0])) == {0, 2, 9}
    with Image.open(out / "masks" / "0.png") as picture:
        palette = np.array(picture.getpalette()).reshape(-1, 3)
    assert [tuple(palette[index]) for index in (0, 2, 9)] == [(0, 0, 0), *COLOURS[:2]]
    assert set(np.unique(read_ids(out / "masks" / "0.png"))) == {0, 2, 9}  # as everything else here reads it
    run(models["float"], folder, out, "--object", "4", "--mask", str(tmp_path / "ids.png"), "--force")
    assert set(np.unique(tracked(out)[0])) == {0, 4}


# Whole or not at all


def test_colours_are_in_the_order_of_ids(models: dict[str, Path], folder: Path, picture: Path, out: Path) -> None:
    """In pictures and videos alike, whatever the order of the prompts."""
    words = ["--object", "5", "--box", "40,5,70,40", "--object", "2", "--point", "20,20"]
    run(models["float"], picture, out / "picture", *words)
    run(models["float"], folder, out / "video", *words)
    for path in (out / "picture" / "mask.png", out / "video" / "masks" / "0.png"):
        with Image.open(path) as mask:
            palette = np.array(mask.getpalette()).reshape(-1, 3)
        assert [tuple(palette[index]) for index in (2, 5)] == list(COLOURS[:2])
    ids = read(out / "picture" / "mask.png")
    with Image.open(out / "picture" / "overlay.png") as drawn:
        outlines = {tuple(colour) for colour in np.array(drawn).reshape(-1, 3)} & set(COLOURS)
    assert {COLOURS[(2, 5).index(own_id)] for own_id in np.unique(ids[ids > 0])} == outlines


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_nano_says_what_it_is_for(fast: list[str], picture: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("nano", picture, out, *CLICK, *fast, "model.image_size=64")
    assert "nano is for trying things out" in caplog.text and "tiny" in caplog.text


def test_what_is_there_is_not_overwritten_silently(
    models: dict[str, Path], picture: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    out.mkdir()
    (out / "mask.png").write_text("precious")
    (out / "notes.txt").write_text("kept")
    arguments = ["predict", str(models["float"]), str(picture), *CLICK, "--out", str(out)]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {out / 'mask.png'} is there already: give another --out, or --force to replace it\n"
    )
    assert (out / "mask.png").read_text() == "precious"
    assert main([*arguments, "--force"]) == 0
    assert read(out / "mask.png").shape == (HEIGHT, WIDTH)
    assert {path.name for path in out.iterdir()} == {"mask.png", "overlay.png", "notes.txt"}


@pytest.mark.parametrize("full", [False, True], ids=["a broken frame", "a full disk"])
def test_a_run_that_fails_leaves_nothing(
    models: dict[str, Path], folder: Path, out: Path, tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    source, expected = folder, f"error: {out} could not be written: No space left on device; make room or give another"
    if full:
        monkeypatch.setattr("qsam2.predict.predict.write_ids", no_space)
    else:
        source, expected = tmp_path / "broken", f"error: {tmp_path}/broken/3.jpg: cannot be read as a picture"
        shutil.copytree(folder, source)
        (source / "3.jpg").write_bytes((source / "3.jpg").read_bytes()[:400])
    assert main(["predict", str(models["float"]), str(source), *CLICK, "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)
    assert not out.exists()


# Mistakes


def _file(tmp_path: Path) -> list[str]:
    (tmp_path / "file").write_text("text")
    return [*CLICK, "--out", str(tmp_path / "file")]


def _mask(ids: np.ndarray, mode: str = "P") -> Callable[[Path], list[str]]:
    return lambda tmp_path: ["--mask", write_mask(tmp_path / "mask.png", ids, mode)]


Words = list[str] | Callable[[Path], list[str]]
MISTAKES: dict[str, tuple[Words, str]] = {
    "nothing": ([], "--point X,Y"),
    "point outside": (["--point", "80,20"], "--point 80,20"),
    "negative": (["--point=-1,20"], "--point -1,20"),
    "three corners": (["--box", "1,2,3"], "--box '1,2,3'"),
    "box outside": (["--box", "1,2,30,46"], "--box 1,2,30,46"),
    "box inside out": (["--box", "30,2,1,20"], "--box 30,2,1,20"),
    "one number": (["--point", "20"], "--point '20'"),
    "words": (["--point", "a,b"], "--point 'a,b'"),
    "no number": (["--point", "nan,3"], "--point 'nan,3'"),
    "label": (["--point", "20,20,2"], "--point '20,20,2'"),
    "only off": (["--point", "20,20,0"], "object 1"),
    "two boxes": (["--box", "1,1,5,5", "--box", "2,2,6,6"], "--box: object 1"),
    "no such frame": (["--frame", "5", *CLICK], "--frame 5: frames has frames 0 to 4"),
    "a number beyond all": (["--frame", "1" * 5000, *CLICK], "frames has frames 0 to 4"),
    "frame text": (["--frame", "first", *CLICK], "--frame first"),
    "object 0": (["--object", "0", *CLICK], "--object 0: objects have ids 1 to 254"),
    "object last": ([*CLICK, "--object", "2"], "--object 2"),
    "no mask": (["--mask", "nowhere.png"], "--mask nowhere.png"),
    "mask size": (_mask(np.ones((20, 20))), "is 20x20 (height x width), expected 45x79"),
    "mask empty": (_mask(np.zeros((HEIGHT, WIDTH))), "mask.png"),
    "mask colour": (_mask(pictures(1)[0], "RGB"), "mask.png"),
    "mask and point": (lambda tmp_path: [*_mask(square() * 1)(tmp_path), *CLICK], "object 1"),
    "out is a file": (_file, "file: is a file"),
    "device": ([*CLICK, "--device", "gpu"], "'gpu'"),
    "no cuda": ([*CLICK, "--device", "cuda"], "device cuda: PyTorch finds 0 CUDA devices"),
    "override": ([*CLICK, "model.size=tiny"], "model"),
    "flag": ([*CLICK, "--points", "1,1"], "'--points'"),
}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture, message: Message) -> Callable[..., str]:
    """Runs `qsam2 predict`, which says in one line what is wrong and writes nothing."""

    def run_wrongly(model: Path | str, source: Path, *words: str) -> str:
        where = [] if "--out" in words else ["--out", str(tmp_path / "out")]
        assert main(["predict", str(model), str(source), *where, *words]) == 2
        assert not (tmp_path / "out").exists()
        return message(capsys.readouterr().err)

    return run_wrongly


@pytest.mark.parametrize(("words", "fact"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(
    words: Words, fact: str, refused: Callable[..., str], models: dict[str, Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    error = refused(models["packed"], folder, *(words if isinstance(words, list) else words(tmp_path)))
    assert error.startswith("error: ") and fact in error


@pytest.mark.parametrize(
    ("name", "content"),
    [("nowhere.mp4", None), ("film.mp4", b"no film at all"), ("notes.txt", b"text"), ("photo.jpg", b"no photo")],
)
def test_inputs_that_cannot_be_read_are_one_line(
    name: str, content: bytes | None, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert name in refused("nano", tmp_path / name, *CLICK)


def test_a_model_that_is_not_there_is_one_line(picture: Path, refused: Callable[..., str]) -> None:
    assert "nanno" in refused("nanno", picture, *CLICK)


def test_an_onnx_export_is_no_model(tmp_path: Path, picture: Path, refused: Callable[..., str]) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.json").write_text("{}")
    (exported / "image_encoder.onnx").write_bytes(b"")
    for model in (exported, exported / "image_encoder.onnx"):
        assert "is an export for ONNX Runtime" in refused(model, picture, *CLICK)


def test_a_picture_has_one_frame(picture: Path, refused: Callable[..., str]) -> None:
    assert "--frame 1: photo has frames 0 to 0" in refused("nano", picture, "--frame", "1", *CLICK)
