"""The command line: where arguments may stand, what `train` and `recipes` say, and mistakes, each in one line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from small_models import write_davis
from tqdm import tqdm

from qsam2 import __version__
from qsam2.cli import main, parse
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.errors import UserError
from qsam2.recipe import Recipe
from qsam2.recipe.load import FOLDERS, shipped
from qsam2.train.trainer import ProgressBar

ROOT = Path(__file__).parents[2]
SMALL = ["model.image_size=64", "model.checkpoint=null"]
FAST = ["debug=fast", "data.train=moving_objects:2:train", "data.val=moving_objects:1:val", *SMALL]

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; gives its message."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        stderr = capsys.readouterr().err
        assert status == 2 and "Traceback" not in stderr
        assert stderr.endswith("\n") and stderr.count("\nerror: ") + stderr.startswith("error: ") == 1
        last = stderr.split("\n")[-2]
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quantized recipe without training, in the working folder."""
    monkeypatch.chdir(tmp_path)
    text = "name: mine\nseed: 1\nquantize: {weights: {method: minmax, bits: 4}, activations: {method: minmax, bits: 8}}"
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


# What is understood


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--help", "train evaluate COMMAND"),
        ("train --help", "debug=fast RECIPE resumes"),
        ("evaluate -h", "--pred --reference KIND:ROOT:SPLIT"),
        ("--version", f"qsam2 {__version__}"),
    ],
)
def test_help(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and all(word in out for word in words.split())


@pytest.mark.parametrize(
    "line",
    [
        "evaluate M a.b=1 c=2 --data davis:D --frames 3 --fast",
        "evaluate a.b=1 M c=2 --data davis:D --frames 3 --fast",
        "evaluate --data davis:D a.b=1 --frames 3 --fast c=2 M",
        "evaluate --fast a.b=1 M --data davis:D --frames 3 c=2",
        "evaluate M --fast --data=davis:D a.b=1 --frames=3 c=2",
    ],
)
def test_overrides_stand_anywhere(line: str) -> None:
    options = parse(line.split())
    assert (options.model, options.overrides) == ("M", ["a.b=1", "c=2"])
    assert (options.data, options.frames, options.fast) == ("davis:D", 3, True)


def test_a_path_and_a_value_of_a_flag_may_hold_an_equals_sign() -> None:
    options = parse(["evaluate", "runs/a=b", "--json", "x=1.json"])
    assert (options.model, str(options.json), options.overrides) == ("runs/a=b", "x=1.json", [])


def test_train_py_is_qsam2_train(recipe: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(recipe), "debug=foo"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: debug='foo': should be 'fast', 'overfit' or 'profile'\n"


def test_train_carries_out_the_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert main(["train", "seed=2", str(recipe), "debug=fast"]) == 0
    assert (recipes[0].seed, recipes[0].trainer.max_steps) == (2, 2)
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["float", "50.0", "49.0", "51.0"]
    assert out[2].split() == ["quantized", "48.8", "49.0", "51.0", "-1.2", "(-2.0", "to", "+0.5)", "90.0"]
    assert out[3:] == ["float32 4.00 MB  packed 0.50 MB", "runs/mine/report.html"]


@pytest.mark.parametrize(
    ("command", "by", "resumes"),
    [
        ("train r.yaml", "pipeline.run_recipe", "goes on from what the run folder holds"),
        ("quantize nano", "pipeline.carry_out", "goes on from what the run folder holds"),
        ("sensitivity nano", "sweep.sensitivity.measure_sensitivity", "goes on where it was stopped"),
        ("sweep bits", "sweep.runner.carry_out", "goes on: finished runs are not repeated"),
        ("table ptq", "sweep.runner.carry_out", "goes on: finished runs are not repeated"),
        ("predict nano r.yaml --out out", "predict.predict.predict", "begins anew"),
        ("evaluate nano", "evaluation.scoring.evaluate_model", "begins anew"),
        ("export nano --format onnx --out out", "api.export", "begins anew"),
        ("benchmark memory", "benchmark.remembered_frames.benchmark_memory", "begins anew"),
    ],
)
def test_interruption(
    command: str,
    by: str,
    resumes: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"qsam2.{by}", interrupt)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(command.split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; the same command {resumes}"


@pytest.mark.parametrize(("flag", "said"), [("", "some"), ("--verbose", "all some"), ("--quiet", "")])
def test_what_is_logged(
    flag: str, said: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log lines stand on lines of their own above open progress bars, all of it on stderr."""

    def carry_out(recipe: Recipe) -> None:
        log = logging.getLogger("qsam2")
        for _ in tqdm(range(2), "bar", disable=False):
            log.debug("all")
            log.info("some")
            log.warning("wrong")
        raise UserError("bad")

    monkeypatch.setattr("qsam2.pipeline.carry_out", carry_out)
    monkeypatch.setattr(logging.root, "handlers", [])  # those of pytest
    assert main(["train", str(recipe), *flag.split()]) == 2
    out, err = capsys.readouterr()
    lines = [line.strip() for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert out == "" and [line for line in lines if not line.startswith("bar:")] == [
        *[*said.split(), "wrong"] * 2,
        "error: bad",
    ]
    assert any(line.startswith("bar:") for line in lines) == (flag != "--quiet")


@pytest.mark.parametrize("stage", ["sanity", "train", "validation", "test", "predict"])
def test_lightnings_bars_are_on_stderr(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    with getattr(bar, f"init_{stage}_tqdm")() as shown:
        shown.refresh()
    out, err = capsys.readouterr()
    assert out == "" and "?it/s" in err


def test_sweep_and_table_show_examples_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    for word, other in (("sweep", "table"), ("table", "sweep")):
        with pytest.raises(SystemExit):
            main([word, "--help"])
        help_text = capsys.readouterr().out
        assert f"  qsam2 {word} recipes/{word}s/" in help_text and f"qsam2 {other} recipes" not in help_text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show(encoding: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "qsam2", "predict", "nano", "a.png", "--point", "9,9", "--out", "猫", *SMALL]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (ran.returncode, ran.stdout.split()) == (0, ["\\u732b/mask.png", "\\u732b/overlay.png"]), ran.stderr
    assert (tmp_path / "猫/mask.png").is_file()


def test_output_that_nobody_reads_any_longer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qsam2", "recipes", "bits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


@pytest.mark.parametrize("command", ["train", "quantize"])
def test_what_cannot_be_found_leaves_no_run_folder(command: str, recipe: Path, refused: Refused) -> None:
    words = ["quantize", "nano"] if command == "quantize" else ["train", recipe]
    assert "nowhere" in refused(*words, "data.train=davis:nowhere:train", "output=new")
    assert "nowhere" in refused(*words, "data.val=davis:nowhere:val", "output=new")
    assert "nowhere.pt does not exist" in refused(*words, "model.checkpoint=nowhere.pt", "output=new")
    assert not Path("new").exists()


def test_shipped_files_are_listed_with_their_titles_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words[1] for words in lines if len(words) > 1}
    assert rows.keys() == {name for kind in FOLDERS for name in shipped(kind)}
    assert all(title.endswith(".") for title in rows.values())
    command = [sys.executable, "-m", "qsam2", "recipes", "bits"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, shipped("sweep")["bits"].read_text(), "")


# What is refused

MISTAKES = {
    "": "the following arguments are required: COMMAND; see qsam2 --help",
    "trian": "argument COMMAND: invalid choice: 'trian'",
    "train": "the following arguments are required: RECIPE; see qsam2 train --help",
    "train r.yaml --steps 3": "unknown argument '--steps': a key of the recipe is written key=value",
    "train r.yaml --trainer.max_steps=3": "unknown argument '--trainer.max_steps=3'",
    "train r.yaml nano": "unknown argument 'nano': a key of the recipe is written key=value",
    "train absent.yaml": "recipe absent.yaml does not exist: give a file, or a name",
    "train absent.yaml =3": "recipe absent.yaml does not exist",
    "recipes nothing": "nothing does not ship with qsam2",
    "recipes bits seed=1": "seed=1 does nothing here",
    "evaluate": "nothing to score: give a MODEL (run folder, file or size), or --pred DIR --gt DIR",
    "evaluate model.size=nano": "nothing to score: give a MODEL",
    "evaluate nano --frames x": "argument --frames: invalid int value: 'x'; see qsam2 evaluate --help",
    "evaluate nano --frames 0": "evaluate.frames=0: should be greater than 0",
    "evaluate nano --protocol coco": "argument --protocol: invalid choice: 'coco'",
    "evaluate nano a..b=3": "'a..b=3' is no override; write key=value with a dotted key",
    "evaluate --pred p": "--pred DIR and --gt DIR go together, without a MODEL",
    "evaluate nano --pred p --gt g": "--pred DIR and --gt DIR go together, without a MODEL",
    "evaluate --pred p --gt g --frames 3": "--frames does nothing with --pred and --gt",
    "evaluate --pred p --gt g seed=3": "seed=3 does nothing with --pred and --gt",
    "evaluate --pred p --gt absent": "absent: no such folder; give the one that holds the sequences",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_on_the_command_line(refused: Refused, line: str) -> None:
    assert refused(*line.split()).startswith(MISTAKES[line])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("accelerator=foo", "trainer: You selected an invalid accelerator name: `accelerator='foo'`."),
        ("devices=x", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("strategy=foo", "trainer: You selected an invalid strategy name: `strategy='foo'`."),
    ],
)
def test_no_such_devices(refused: Refused, recipe: Path, override: str, message: str) -> None:
    assert refused("train", recipe, *FAST, "trainer.accelerator=cpu", f"trainer.{override}").startswith(message)


def test_damaged_data(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    """Scoring and training name the file."""
    davis = write_davis(tmp_path / "DAVIS", moving_objects("val", 1, size=(64, 96))[0], 4)
    mask, frame = davis / "Annotations/v/00002.png", davis / "JPEGImages/v/00001.png"
    right = mask.read_bytes()
    Image.new("L", (32, 24)).save(mask)
    message = refused("evaluate", "nano", "--data", f"davis:{davis}:val", *SMALL)
    assert message.startswith(f"{mask}: is 24x32 (height x width), expected 64x96")
    mask.write_bytes(right)
    frame.write_bytes(b"")
    training = [f"data.train=davis:{davis}:val", "calibrate.clips=1", "calibrate.num_frames=4"]
    assert refused("train", recipe, *FAST, *training).startswith(f"{frame}: cannot be read as a picture (")


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("packed", "quantize.weights.bits=8", "is a quantized model: quantize cannot be changed by an override"),
        ("packed", "model.image_size=96", "is a quantized model: model cannot be changed by an override"),
        ("packed", "evaluate.frame=3", "did you mean 'frames'?"),
        ("float", "quantize.weights={method: lsq, bits: 8}", "this model is float; run a recipe to quantize it"),
    ],
)
def test_a_model_stays_as_it_is(
    refused: Refused, models: dict[str, Path], model: str, override: str, message: str
) -> None:
    assert refused("evaluate", models[model], override).endswith(message)


def test_scores_that_cannot_be_written_are_refused_before_the_work(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / "file/scores.json"
    assert refused("evaluate", "absent", "--json", file).startswith(f"--json {file}: its folder cannot be made")
    assert (
        refused("evaluate", "absent", "--json", tmp_path) == f"--json {tmp_path}: is a folder; give the path of a file"
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "report", "export", "sweep"])
def test_words_that_no_path_can_be_are_refused_in_a_short_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    more = {"predict": ["a.png", "--out", "o", "--box", "0,0,9,9"], "export": ["--format", "onnx", "--out", "o"]}
    assert main([command, "x" * 5000, *more.get(command, [])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700 and "xx...xx" in said
