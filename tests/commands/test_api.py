"""`qsam2.quantize`, `evaluate` and `export`, and their commands: data without masks, masks on disk, mistakes."""

from __future__ import annotations

import html
import itertools
import json
import shutil
from collections.abc import Callable
from doctest import DocTestFinder, DocTestRunner
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_models import write_davis

import qsam2
from qsam2.cli import main
from qsam2.data.sources import source_of
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.unlabelled import OWN_MASKS
from qsam2.errors import UserError
from qsam2.recipe import Recipe, load_recipe
from qsam2.recipe.quantize import parse_bits

FAST = ["model.image_size=64", "calibrate.stills=2", "calibrate.clips=1", "calibrate.num_frames=2"]
FAST += ["quantize.weights.range=minmax", "quantize.activations.range=minmax", "trainer.accelerator=cpu"]


def write_frames(folder: Path, count: int) -> Path:
    """Pictures of a generated video."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(moving_objects("val", 1, size=(64, 96))[0].frame(index)).save(folder / f"{index:05d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_frames(tmp_path_factory.mktemp("data") / "pictures", 6)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one folder of 16 frames."""
    return write_frames(tmp_path_factory.mktemp("film") / "x", 16).parent


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def quantized(models: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `qsam2 quantize` on pictures."""
    out = tmp_path_factory.mktemp("quantized") / "run"
    assert run("quantize", models["float"], "--bits", "w4a8", "--data", pictures, "--out", out, *FAST) == 0
    return out


@pytest.fixture
def recipe_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """`quantize` without carrying out its recipe, which is given back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qsam2.pipeline.run_recipe", lambda recipe: {})
    return lambda *arguments, **options: qsam2.quantize(*arguments, **options).recipe


def check_fidelity_alone(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("float", "quantized"):
        assert (metrics[name]["protocol"], metrics[name]["prompts"]) == ("fidelity", OWN_MASKS)
        assert "J&F" not in metrics[name] and 0 <= metrics[name]["fidelity"] <= 100
    versus = metrics["quantized"]["versus_float"]
    if versus[versus["unit"]] == 1:
        assert versus["low"] is versus["high"] is None
    else:
        assert versus["low"] <= versus["difference"] <= versus["high"]
    assert json.loads((folder / "card.json").read_text())["prompts"] == OWN_MASKS
    for name in ("card.md", "report.html"):
        assert OWN_MASKS in html.unescape((folder / name).read_text())


def test_pictures_quantize_a_model(quantized: Path) -> None:
    check_fidelity_alone(quantized)
    recipe = load_recipe(quantized / "recipe.yaml")
    assert (recipe.quantize.weights.bits, recipe.quantize.activations.bits) == (4, 8)
    assert [spec.split(":")[-1] for spec in (*recipe.data.train, recipe.data.val)] == ["train", "val"]


def test_a_film_quantizes_a_model(
    models: dict[str, Path], film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("quantize", models["float"], "--data", film, "--out", out, *FAST, "evaluate.frames=4") == 0
    said = capsys.readouterr().out
    for part in (f"recipe: {out / 'recipe.yaml'}", OWN_MASKS, f"{out / 'model.safetensors'}  ", "bits: 8"):
        assert part in said
    check_fidelity_alone(out)
    assert json.loads((out / "report/clips.json").read_text())["clips"]


@pytest.mark.parametrize(
    ("bits", "recipe", "both", "rounding"),
    [
        (None, None, (8, 8), None),
        (4, None, (4, 4), None),
        ("w2a8", None, (2, 8), "gptq"),
        (None, "ptq_w4a8", (4, 8), None),
        ("w3a6", "ptq_w4a8", (3, 6), None),
    ],
)
def test_bits_and_recipes(
    recipe_of: Callable[..., Recipe], bits: Any, recipe: Any, both: tuple[int, int], rounding: str | None
) -> None:
    plan = recipe_of("nano", recipe, bits=bits)
    assert (plan.quantize.weights.bits, plan.quantize.activations.bits) == both
    assert (plan.calibrate.rounding and plan.calibrate.rounding.method) == rounding


def test_a_recipe_file_is_laid_under_the_model_and_data(
    recipe_of: Callable[..., Recipe], models: dict[str, Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text("name: mine\nquantize: {weights: {method: minmax, bits: 3}}\n")
    plan = recipe_of(models["float"], file, "moving_objects:2", out=out)
    assert (plan.name, plan.quantize.weights.bits, plan.data.train) == ("mine", 3, ("moving_objects:2",))
    assert plan.run_folder == out and plan.model.checkpoint == str(models["float"])


@pytest.mark.parametrize(
    ("bits", "both"), [(8, (8, 8)), ("4", (4, 4)), ("W4A8", (4, 8)), ("4,8", (4, 8)), ("w4", (4, None))]
)
def test_bits(bits: int | str, both: tuple[int, int | None]) -> None:
    assert parse_bits(bits) == both


@pytest.mark.parametrize("bits", ["1", "9", "w4a9", "a4", "", "w4a", "4.5"])
def test_impossible_bits(bits: str) -> None:
    with pytest.raises(UserError, match="give 2 to 8 for both, as 8"):
        parse_bits(bits)


def test_scores_without_masks_need_a_float_reference(quantized: Path, models: dict[str, Path], pictures: Path) -> None:
    block = qsam2.evaluate(quantized, pictures, reference=models["float"])
    assert block["images"] == 6 and block["fidelity"] < 100  # all of them, not the held-out ones alone
    assert block["versus_reference"]["difference"] == pytest.approx(block["fidelity"] - 100)


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_masks_on_disk_score_as_the_model(models: dict[str, Path], tmp_path: Path, protocol: str) -> None:
    saved, count = tmp_path / "masks", 5
    video = moving_objects("val", 1, size=(64, 96))[0]
    root = write_davis(tmp_path / "davis", video, count)
    seen = {item for index in range(count) for item, mask in video.masks(index).items() if mask.any()}
    for index, item in itertools.product(range(count), seen):
        single = tmp_path / "sav" / "v" / f"{item - 1:03d}" / f"{index:05d}.png"
        single.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(video.masks(index)[item]).save(single)
    block = qsam2.evaluate(models["float"], root, protocol=protocol, save_masks=saved, overrides=FAST[:1])
    assert len(list(saved.rglob("*.png"))) == count * (len(seen) if protocol == "sav" else 1)
    gt = root / "Annotations" if protocol == "davis" else tmp_path / "sav"
    assert run("evaluate", "--pred", saved, "--gt", gt, "--protocol", protocol, "--json", saved / "scores.json") == 0
    scores = json.loads((saved / "scores.json").read_text())
    for key in ("J&F", "J", "F"):
        assert scores[key] == pytest.approx(block[key], abs=1e-9)
    with pytest.raises(UserError, match="exists already; give a new folder"):
        qsam2.evaluate(models["float"], root, save_masks=saved)


def test_a_path_is_no_yaml(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """What follows ` #` is a comment in YAML: the folder `data` would be scored in place of `data #2`."""
    for name, count in (("data", 1), ("data #2", 2)):
        (tmp_path / name).mkdir()
        for file in sorted(pictures.iterdir())[:count]:
            shutil.copy(file, tmp_path / name)
    assert qsam2.evaluate(models["float"], tmp_path / "data #2", reference=models["float"])["images"] == 2


def test_data_is_recognised(tmp_path: Path, pictures: Path, film: Path) -> None:
    assert source_of("moving_objects:3") == "moving_objects:3" and source_of("davis:/a:val") == "davis:/a:val"
    assert source_of(pictures) == f"images:{pictures}" and source_of(film) == f"video:{film}"
    file = pictures / "00000.png"
    assert source_of(file) == f"images:{file}"
    (tmp_path / "a.mp4").write_text("")
    assert source_of(tmp_path) == f"video:{tmp_path}" and source_of(tmp_path / "a.mp4").startswith("video:")
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / name).mkdir()
    assert source_of(tmp_path) == f"davis:{tmp_path}"


def test_mistakes(quantized: Path, models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    def refused(message: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            function(*arguments, **options)

    refused("is quantized already: give the float model", qsam2.quantize, quantized)
    refused("quantize=null quantizes nothing", qsam2.quantize, models["float"], overrides=["quantize=null"])
    absent = "data 'absent': does not exist; give a folder or file, or KIND:ROOT:SPLIT"
    refused(absent, qsam2.quantize, models["float"], data="absent")
    no_masks = "its score is the fidelity to a float model"
    refused(f"has no masks, {no_masks}: .* --reference", qsam2.evaluate, quantized, pictures)
    refused(no_masks, qsam2.evaluate, quantized, pictures, reference=quantized)
    saved = {"reference": models["float"], "save_masks": tmp_path / "m"}
    stills = "--save-masks writes tracked masks, but the data holds pictures"
    refused(stills, qsam2.evaluate, models["float"], pictures, **saved)
    refused("format 'tflite' is unknown: give onnx or packed", qsam2.export, quantized, "tflite", tmp_path)


OFFERED = ["evaluate", "export", "image_predictor", "load", "quantize", "video_predictor"]


@pytest.mark.parametrize("name", OFFERED)
def test_the_examples_of_docstrings_run(
    name: str, quantized: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for amount, value in {"STILLS": 1, "CLIPS": 1, "CLIP_FRAMES": 2}.items():
        monkeypatch.setattr(f"qsam2.api.{amount}", value)
    (tmp_path / "runs").mkdir()
    for path, target in (("pictures", pictures), ("frames", pictures), ("runs/w8a8", quantized)):
        if name != "quantize" or path == "pictures":
            (tmp_path / path).symlink_to(target)
    finder = DocTestFinder()
    found = [test for test in finder.find(getattr(qsam2, name), name, globs={"qsam2": qsam2}) if test.examples]
    assert found, f"{name} has no example"
    for test in found:
        assert DocTestRunner().run(test).failed == 0


def test_the_names_that_the_library_offers() -> None:
    assert [name for name in dir(qsam2) if not name.startswith("_")] == OFFERED
