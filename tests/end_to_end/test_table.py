"""A small table from its runs to its Markdown, cut off in the middle: real recipes, scored on videos and stills."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from small_models import write_stills
from small_runs import FLOAT, TRAIN, W4A4

from qsam2.cli import main
from qsam2.evaluation.scoring import evaluate_model
from qsam2.recipe.load import merge
from qsam2.sweep import runner
from qsam2.sweep.results import extract, render
from qsam2.train import video_training

CUT_OFF = "nano_minmax_W2A4_s0"


class Killed(BaseException):
    """Stands for SIGKILL of the table and its runs."""


class KillInSecondStep(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:  # the checkpoint of the first is there
            raise Killed


class InProcess:
    """A run's process, without the seconds that it takes to start one."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.command = command

    def wait(self) -> None:
        self.returncode = main(self.command)

    def poll(self) -> int:
        return 0


@pytest.fixture
def table(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two methods, each at its own bits, and a document with a place for the table."""
    stills = write_stills(tmp_path)
    recipe = merge(FLOAT, {"quantize": W4A4, "train": TRAIN, "model": {"checkpoint": str(checkpoint)}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    table = {
        "name": "small",
        "title": "A small table",
        "recipe": "recipe.yaml",
        "run_seconds": 5,
        "sets": {
            "clips": {"data": "moving_objects:1:val", "frames": 4},
            "stills": {"data": stills},
        },
        "common": {
            "calibrate.stills": 0,
            "evaluate.after_calibration": False,
            "trainer.max_steps": 2,
            "trainer.checkpoint_every": 1,
        },
        "models": {"nano": {}},
        "methods": {
            "lsc": {},
            "minmax": {"quantize.weights.method": "minmax", "quantize.activations.method": "minmax"},
        },
        "settings": {"W4A4": {}, "W2A4": {"quantize.weights.bits": 2}},
        "runs": [{"methods": ["lsc"], "settings": ["W4A4"]}, {"methods": ["minmax"], "settings": ["W2A4"]}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    (tmp_path / "README.md").write_text("# Before\n\n<!-- table:small -->\n<!-- /table:small -->\n\nAfter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "QSAM2", ())
    monkeypatch.setattr(runner, "Popen", InProcess)
    return tmp_path / "small.yaml"


def kill_in(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = video_training.training_options

    def with_kill(recipe: Any, quantizers: Any, **given: Any) -> dict[str, Any]:
        chosen = options(recipe, quantizers, **given)
        more = [KillInSecondStep()] if recipe.run_folder.name == run else []
        return {**chosen, "callbacks": [*chosen["callbacks"], *more]}

    monkeypatch.setattr(video_training, "training_options", with_kill)


def test_a_table_that_is_cut_off_goes_on_and_is_written(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table", "small.yaml", "--output", "out", "--write", "README.md"]
    kernels: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patch:
        kill_in(CUT_OFF, patch)
        patch.setattr(video_training, "choose_kernels", lambda *given: kernels.append(given))
        with pytest.raises(Killed):
            main(command)
    assert [given[:2] for given in kernels] == [("auto", 2)] * 2
    out = Path("out")
    finished = [out / "float_nano" / "scores.json", out / "nano_lsc_W4A4_s0" / "metrics.json"]
    written = [file.stat().st_mtime_ns for file in finished]
    assert (out / CUT_OFF / "checkpoints" / "last.ckpt").is_file() and not (
        out / CUT_OFF / "model.safetensors"
    ).is_file()
    kept = list((out / "float").iterdir())
    assert len(kept) == 2

    capsys.readouterr()
    assert main(command) == 0
    assert [file.stat().st_mtime_ns for file in finished] == written
    assert list((out / "float").iterdir()) == kept
    assert not list(out.glob("*/checkpoints"))

    results = json.loads(Path("docs/tables/small.json").read_text())
    assert results["runs"]["finished"] == 2 and results["runs"]["failed"] == 0
    shown = extract(Path("README.md"), "small")
    assert shown == render(results) and capsys.readouterr().out.strip().endswith(shown)
    number = r"(\*\*)?\d+\.\d(\*\*)? \(no interval: one video\) \d+"
    lsc, minmax = (line for line in shown.partition("<details>")[0].splitlines() if line.startswith(("| lsc", "| min")))
    assert re.fullmatch(rf"\| lsc \| {number} \| \|", lsc) and re.fullmatch(rf"\| minmax \| \| {number} \|", minmax)

    # Each cell is what `qsam2 evaluate` says of the run folder
    cell = next(c for c in results["cells"] if (c["method"], c["setting"]) == ("minmax", "W2A4"))
    checkpoint = yaml.safe_load(Path("recipe.yaml").read_text())["model"]["checkpoint"]
    for name, key in (("clips", "J&F"), ("stills", "box_mIoU")):
        data = yaml.safe_load(table.read_text())["sets"][name]
        overrides = [f"data.val={data['data']}", f"evaluate.frames={data.get('frames', 'null')}"]
        block = evaluate_model(str(out / CUT_OFF), [*overrides, "evaluate.float_cache=null"], reference=checkpoint)
        assert cell["sets"][name]["score"] == pytest.approx(block[key], abs=1e-3)
        assert cell["sets"][name]["fidelity"] == pytest.approx(block["fidelity"], abs=1e-3)
        versus = block["versus_reference"]
        difference = (versus if name == "clips" else versus["box_IoU"])["difference"]
        assert cell["sets"][name]["difference"] == pytest.approx(difference, abs=1e-3)
