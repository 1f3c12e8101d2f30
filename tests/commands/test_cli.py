"""The command line: help, where arguments may stand, what `train` and `evaluate` are given, and the JSON they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_models import seeing, write_stills

from qsam2 import __version__
from qsam2.cli import main
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.formats.packed import save_weights
from qsam2.loading import load_model
from qsam2.models import SAM2
from qsam2.recipe import Recipe, build_recipe

ROOT = Path(__file__).parents[2]
KEYS = {"protocol", "J&F", "J", "F", "J_recall", "J_decay", "F_recall", "F_decay", "per_object"}
KEYS |= {"seconds_per_frame", "model", "fidelity"}
SIZE = ["model.image_size=64"]


@pytest.fixture(scope="module")
def model() -> SAM2:
    """nano with random weights that believes in its objects."""
    return seeing()


@pytest.fixture(scope="module")
def checkpoint(model: SAM2, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("float") / "nano.pt"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture
def run_folder(runs: dict[str, Path]) -> str:
    """A finished run, with weights of 3 bits and SA-V's protocol."""
    return str(runs["reconstructed"])


def read(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# Help


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--help"], ["train", "evaluate", "COMMAND"]),
        (["train", "--help"], ["examples:", "qsam2 train demo", "debug=fast", "RECIPE", "resumes"]),
        (
            ["evaluate", "-h"],
            ["examples:", "qsam2 evaluate nano", "--pred DIR", "--reference MODEL", "KIND:ROOT:SPLIT"],
        ),
        (["--version"], [__version__]),
    ],
)
def test_help(arguments: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert [text for text in texts if text not in out] == []
    assert max(map(len, out.splitlines())) <= 120


def test_the_recipes_of_the_examples_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    named = {word for word in capsys.readouterr().out.split() if word.endswith(".yaml")}
    assert named and all((ROOT / name).is_file() for name in named)


def test_train_py_is_qsam2_train(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\n")
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "r.yaml"), "debug=foo"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: debug='foo': should be 'fast', 'overfit' or 'profile'\n"


# Where arguments may stand


@pytest.mark.parametrize(
    "line",
    [
        "evaluate M a.b=1 c=2 --data davis:D --frames 3",
        "evaluate a.b=1 M c=2 --data davis:D --frames 3",
        "evaluate --data davis:D a.b=1 --frames 3 c=2 M",
        "evaluate --data davis:D --frames 3 a.b=1 c=2 M",
        "evaluate M --data=davis:D a.b=1 --frames=3 c=2",
    ],
)
def test_overrides_stand_anywhere(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def evaluate_model(*arguments: Any, **options: Any) -> dict[str, Any]:
        given.extend([*arguments, options])
        return {"model": "M", "J&F": 1.0}

    monkeypatch.setattr("qsam2.evaluation.scoring.evaluate_model", evaluate_model)
    assert main(line.split()) == 0
    whole = ["evaluate.frames=null", "evaluate.videos=null"]
    overrides = [*whole, "a.b=1", "c=2", "data.val=davis:D", "evaluate.frames=3"]
    assert given == ["M", overrides, {"reference": None, "fast": False}]
    assert capsys.readouterr().out == "M: J&F 1.0\n"


@pytest.mark.parametrize("line", ["evaluate M --fast a.b=1 c=2", "evaluate --fast a.b=1 M c=2"])
def test_a_flag_without_a_value_takes_no_override(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "qsam2.evaluation.scoring.evaluate_model", lambda *a, **k: given.append((*a, k)) or {"model": "M"}
    )
    assert main(line.split()) == 0
    assert given == [("M", ["a.b=1", "c=2"], {"reference": None, "fast": True})]


def test_a_value_of_a_flag_may_hold_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qsam2.evaluation.scoring.evaluate_model", lambda model, *_, **__: {"model": model})
    assert main(["evaluate", "runs/a=b", "--json", "made/x=1.json"]) == 0
    assert read(tmp_path / "made/x=1.json") == {"model": "runs/a=b"}


def test_train_carries_out_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes: list[Recipe] = []
    score = {"J&F": 50.0, "J": 49.0, "F": 51.0}
    versus = {"difference": -1.25, "low": -2.0, "high": 0.5}
    metrics = {
        "float": score,
        "quantized": {**score, "J&F": 48.75, "fidelity": 90.0, "versus_float": versus},
        "bytes": {"float32": 4_000_000, "packed": 500_000},
    }
    monkeypatch.setattr("qsam2.pipeline.run_recipe", lambda recipe: recipes.append(recipe) or metrics)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text("name: mine\nseed: 1\n")
    assert main(["train", "seed=2", str(path), "debug=fast"]) == 0
    assert (recipes[0].seed, recipes[0].trainer.max_steps) == (2, 2)
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["float", "50.0", "49.0", "51.0"]
    assert out[2].split() == ["quantized", "48.8", "49.0", "51.0", "-1.2", "(-2.0", "to", "+0.5)", "90.0"]
    assert out[3:] == ["float32 4.00 MB  packed 0.50 MB", "runs/mine/report.html"]


def test_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsam2.pipeline.run_recipe", interrupt)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("name: x\n")
    assert main(["train", str(tmp_path / "r.yaml")]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from the last checkpoint\n"


# Scores


def test_scores_of_a_model_on_videos(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/scores.json"
    flags = ["--data", "moving_objects:2:val", "--frames", "4", "--videos", "1"]
    assert main(["evaluate", checkpoint, *SIZE, *flags, "--json", str(out)]) == 0
    block = read(out)
    assert block.keys() == KEYS | {"precision"}
    assert (block["protocol"], block["model"], block["fidelity"]) == ("davis", checkpoint, None)
    video = moving_objects("val", 1)[0]
    assert {video.name: {str(i) for i in video.masks(0)}} == {v: set(o) for v, o in block["per_object"].items()}
    objects = [scores for each in block["per_object"].values() for scores in each.values()]
    for key in ("J&F", "J", "F"):
        assert block[key] == pytest.approx(np.mean([scores[key] for scores in objects]))
        assert 0 <= block[key] <= 100
    assert block["J"] > 0 and 0 < block["seconds_per_frame"] < 60
    line = capsys.readouterr().out.split("\n")[-2]  # Lightning's progress bars stand before it
    assert line == f"{checkpoint}: J&F {block['J&F']:.1f}, J {block['J']:.1f}, F {block['F']:.1f}"


def test_other_data_are_scored_as_a_whole_whatever_part_of_its_own_the_run_scored(
    run_folder: str, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    flags = ["--data", "moving_objects:2:val", "--json", str(out)]
    assert main(["evaluate", run_folder, *flags, "evaluate.frames=4"]) == 0
    assert len(read(out)["per_object"]) == 2
    lengths: list[int | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qsam2.evaluation.scoring.score_float", lambda *a, **_: lengths.append(a[2].frames) or ({"J&F": 1.0}, {})
        )
        assert main(["evaluate", run_folder, *flags]) == 0
        assert main(["evaluate", run_folder]) == 0
    assert lengths == [None, 4]


def test_scores_against_a_reference(run_folder: str, tmp_path: Path) -> None:
    """The run's own recipe says what to score on; the reference runs at the run's image size."""
    out = tmp_path / "scores.json"
    assert main(["evaluate", run_folder, "--reference", "nano", "--json", str(out)]) == 0
    block = read(out)
    assert block.keys() == KEYS | {"precision", "versus_reference"}
    assert (block["protocol"], block["model"]) == ("sav", run_folder)
    assert 0 < block["fidelity"] < 100
    flags = ["--data", "moving_objects:1:val", "--frames", "4", "--protocol", "sav"]
    flags += ["--reference", f"{run_folder}/model.safetensors", "--json", str(out)]
    assert main(["evaluate", "nano", *SIZE, *flags]) == 0
    turned = read(out)
    assert turned["fidelity"] == pytest.approx(block["fidelity"])
    found = block["versus_reference"]
    assert found["difference"] == pytest.approx(block["J&F"] - turned["J&F"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["objects"] == sum(map(len, block["per_object"].values()))


@pytest.fixture
def stills(tmp_path: Path) -> str:
    return write_stills(tmp_path)


def test_scores_on_stills(checkpoint: str, stills: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert main(["evaluate", checkpoint, *SIZE, "--data", stills, "--reference", checkpoint, "--json", str(out)]) == 0
    block = read(out)
    assert block["protocol"] == "stills" and block["images"] == 2
    assert (block["model"], block["fidelity"]) == (checkpoint, 100)
    assert block["versus_reference"]["point_IoU"]["difference"] == 0
    line = capsys.readouterr().out
    for key in ("point_mIoU", "box_mIoU"):
        assert 0 < block[key] <= 100
        assert f"{key} {block[key]:.1f}" in line


def test_scores_of_masks_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A square that is predicted one row too high."""
    for folder, top in (("gt", 10), ("pred", 9)):
        (tmp_path / folder / "cat").mkdir(parents=True)
        mask = np.zeros((64, 64), np.uint8)
        mask[top : top + 20, 10:30] = 1
        for index in range(4):
            Image.fromarray(mask, "L").save(tmp_path / folder / "cat" / f"{index:05d}.png")
    arguments = ["--pred", str(tmp_path / "pred"), "--gt", str(tmp_path / "gt"), "--json", str(tmp_path / "s.json")]
    assert main(["evaluate", *arguments]) == 0
    block = read(tmp_path / "s.json")
    assert block.keys() == KEYS
    assert (block["protocol"], block["seconds_per_frame"], block["fidelity"]) == ("davis", None, None)
    assert block["model"] == str(tmp_path / "pred")
    assert block["J"] == pytest.approx(100 * 19 / 21) and block["F"] == 100
    assert block["per_object"] == {"cat": {"1": {key: block[key] for key in ("J&F", "J", "F")}}}
    assert "J&F 95.2, J 90.5, F 100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("protocol", "pred", "gt"),
    [("davis", "davis/results", "davis/Annotations/480p"), ("sav", "sav/pred", "sav/gt")],
)
def test_golden_scores(data_root: Path, tmp_path: Path, protocol: str, pred: str, gt: str) -> None:
    golden, out = data_root / "golden_jf", tmp_path / "scores.json"
    if not golden.is_dir():
        pytest.skip(f"{golden} is absent")
    folders = ["--pred", str(golden / pred), "--gt", str(golden / gt)]
    assert main(["evaluate", *folders, "--protocol", protocol, "--json", str(out)]) == 0
    expected, block = json.loads((golden / protocol / "expected.json").read_text()), read(out)
    assert block["J&F"] == pytest.approx(expected["J&F"] * (100 if protocol == "davis" else 1), abs=1e-9)


# MODEL


def test_model_files(model: SAM2, checkpoint: str, run_folder: str, tmp_path: Path) -> None:
    """Checkpoints of any size, float runs and packed files; each knows its recipe or is guessed from its shapes."""
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    recipe = build_recipe({"name": "float", "model": {"image_size": 64}, "evaluate": {"frames": 5}})
    save_weights(tmp_path / "model.safetensors", model, recipe.model_dump(mode="json"))
    for target in (checkpoint, tmp_path / "bare.safetensors", tmp_path):
        loaded, found = load_model(target, SIZE)
        assert not loaded.training and loaded.image_size == 64
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (found.name, found.evaluate.frames) == ("float", 5)
    quantized, found = load_model(run_folder, ["evaluate.frames=7", "model.image_size=64"])
    assert found.quantize is not None and found.evaluate.frames == 7
    weight = quantized.obj_ptr_tpos_proj.weight
    assert all(len(row.unique()) <= 8 for row in weight)


def test_model_of_a_size(tmp_path: Path) -> None:
    loaded, recipe = load_model("tiny", ["model.checkpoint=null", "model.image_size=64", "model.version=2"])
    assert (recipe.model.size, recipe.model.version) == ("tiny", "2")
    torch.save({"model": loaded.state_dict()}, tmp_path / "tiny.pt")
    _, recipe = load_model(tmp_path / "tiny.pt", SIZE)
    assert (recipe.model.size, recipe.model.version) == ("tiny", "2")
