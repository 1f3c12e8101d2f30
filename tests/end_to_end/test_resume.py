"""A run that is killed in mid-training and started again ends with the weights of one that was not."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from messages import Message
from safetensors.torch import load_file
from small_runs import CLICKS, ROOT, RUNS, TRAIN, TRAIN_FLOAT, W4A4, read_checkpoint, small, without_seconds
from waiting import HANG_S, wait_until
from wandb_file import records

from qsam2 import pipeline
from qsam2.errors import UserError
from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe
from qsam2.recipe.load import merge
from qsam2.train import video_training
from qsam2.train.trainer import WeightAverage

pytestmark = pytest.mark.slow


class Killed(Exception):
    """Stands for SIGKILL without a process of its own."""


class KillAfterBatch(Callback):
    """Ends a run after a batch, before anything that follows it."""

    def __init__(self, batch_index: int) -> None:
        self.batch_index = batch_index

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if batch_index == self.batch_index:
            raise Killed


def assert_same_results(run_folder: Path, expected_folder: Path) -> None:
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (run_folder, expected_folder))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    scores, expected_scores = (
        without_seconds(json.loads((folder / "metrics.json").read_text())) for folder in (run_folder, expected_folder)
    )
    assert scores == expected_scores


SIGKILLED = """
import os, signal, sys
from lightning.pytorch.callbacks import Callback
from qsam2.cli import main
from qsam2.train import video_training
from qsam2.train.trainer import WeightAverage

class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

options = video_training.training_options
def with_kill(*args, **more):
    chosen = options(*args, **more)
    return {**chosen, "callbacks": [*chosen["callbacks"], Kill()]}
video_training.training_options = with_kill
main(["train", sys.argv[1]])
"""


def test_sigkill_in_mid_training(checkpoint: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", runs["qat"]
    values = small(checkpoint, killed, **RUNS["qat"] | {"log": {"wandb": "off"}})
    steps = values["trainer"]["max_steps"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", SIGKILLED, str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
    assert 1 <= read_checkpoint(killed)["global_step"] < steps
    assert not (killed / "model.safetensors").exists()

    run_recipe(build_recipe(values))
    assert_same_results(killed, whole)
    ends = [read_checkpoint(folder) for folder in (killed, whole)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == steps
    for name, tensor in ends[1]["state_dict"].items():
        assert torch.equal(ends[0]["state_dict"][name], tensor), name


COUNTED = {
    "qsam2.calibration.weights": ("gather_inputs",),
    "qsam2.calibration.smooth": ("gather_reader_inputs",),
    "qsam2.calibration.activation_ranges": ("find_sam2_ranges",),
    "qsam2.calibration.gptq": ("round_sam2",),
    "qsam2.reconstruction.block_by_block": ("Reconstruction",),
    "qsam2.evaluation.scoring": ("score_float", "score_any"),
}
"""Functions that the stages of calibration and scoring call for their work."""


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of what `COUNTED` names, from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str, work: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return work(*args, **options)

        return counted

    for module, names in COUNTED.items():
        for name in names:
            original = getattr(importlib.import_module(module), name)
            monkeypatch.setattr(f"{module}.{name}", counting(name, original))
    return calls


def test_what_is_calibrated_and_scored_is_not_done_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies at the start of each stage in turn carries out each once, and ends as one that did not die."""
    minmax = {"method": "minmax", "bits": 4, "range": "minmax"}
    settings = {
        "calibrate": {"weights": "frobenius", "smooth": [0.5], "rounding": "gptq", "stills": 2, "clips": 2},
        "quantize": {"weights": minmax, "activations": minmax},
        "reconstruct": {"method": "brecq", "iterations": 2, "blocks": ["obj_ptr_proj"]},
    }
    whole = tmp_path / "whole"
    run_recipe(build_recipe(small(checkpoint, whole, **settings)))
    values = small(checkpoint, tmp_path / "killed", **settings)
    calls = count_calls(monkeypatch)
    for stage in (
        "smooth_norms",
        "calibrate_ranges",
        "round_weights",
        "reconstruct_blocks",
        "score_calibrated",
        "report",
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(pipeline, stage, _die_as(stage))
            run_recipe(build_recipe(values))
    run_recipe(build_recipe(values))
    assert calls == {
        "gather_inputs": 1, "gather_reader_inputs": 1, "find_sam2_ranges": 1, "round_sam2": 1, "Reconstruction": 1,
        "score_float": 1, "score_any": 2,
    }  # fmt: skip
    assert_same_results(tmp_path / "killed", whole)
    layers = [json.loads((folder / "report" / "layers.json").read_text()) for folder in (tmp_path / "killed", whole)]
    assert layers[0] == layers[1]
    assert not (tmp_path / "killed" / "checkpoints" / "stages").exists()


def _die_as(stage: str) -> Any:
    def die(run: Any) -> None:
        raise Killed

    die.__name__ = stage
    return die


def test_qat_is_calibrated_and_scored_once(
    checkpoint: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small(checkpoint, tmp_path / "killed", **RUNS["qat"] | {"log": {"wandb": "off"}})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(2, patch)
        run_recipe(build_recipe(values))
    calls = count_calls(monkeypatch)
    run_recipe(build_recipe(values))
    assert calls == {"score_any": 1}  # the trained model
    assert_same_results(tmp_path / "killed", runs["qat"])


@pytest.mark.parametrize("file", ["model.ckpt", "float-0-of-1.npz"])
def test_a_damaged_file_of_a_stage_is_named(
    file: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:
    values = small(checkpoint, tmp_path / "run", **RUNS["ptq"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "round_weights", _die_as("round_weights"))
        run_recipe(build_recipe(values))
    (tmp_path / "run" / "checkpoints" / "stages" / file).write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        run_recipe(build_recipe(values))
    assert file in message(error)


def test_a_kill_between_the_batches_of_a_step(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"max_steps": 2, "accumulate": 2, "checkpoint_every": 1}
    settings = {"train": merge(TRAIN_FLOAT, CLICKS), "trainer": trainer}
    run_recipe(build_recipe(small(checkpoint, tmp_path / "whole", **settings)))
    kill_and_resume(small(checkpoint, tmp_path / "killed", **settings), tmp_path / "whole", monkeypatch)


def test_a_kill_with_averaging(
    checkpoint: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_and_resume(small(checkpoint, tmp_path / "killed", **RUNS["float"]), runs["float"], monkeypatch)


def test_scores_on_the_way_leave_the_training_as_it_is(checkpoint: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    values = small(checkpoint, tmp_path, **RUNS["qat"] | {"log": {"wandb": "off"}, "evaluate": {"every": 2}})
    run_recipe(build_recipe(values))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    middle, last = metrics.pop("on_the_way")
    assert (middle["step"], last["step"]) == (2, 4) and 0 < middle["seconds"] < last["seconds"]
    assert all(last[key] == metrics["quantized"][key] for key in ("J&F", "fidelity"))
    assert without_seconds(metrics) == without_seconds(json.loads((runs["qat"] / "metrics.json").read_text()))
    assert "Scores over training" in (tmp_path / "report.html").read_text()
    (curves,) = tmp_path.glob("curves/version_*/metrics.csv")
    logged = [float(row["score/J&F"]) for row in csv.DictReader(curves.open()) if row.get("score/J&F")]
    assert logged == pytest.approx([middle["J&F"], last["J&F"]])


@pytest.mark.prove
def test_a_kill_in_the_second_stage(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is not trained again, and curves go on where it ended."""
    first = {"kind": "stills", "steps": 2, "batch_size": 3, "weights": 8, "activations": "float"}
    stages = [first, {"steps": 3, "rate": 0.5}]
    settings = {
        "quantize": W4A4,
        "train": merge(TRAIN, {**CLICKS, "stages": stages, "ema": 0.5}),
        "trainer": {"checkpoint_every": 1},
        "evaluate": {"every": 2},
    }
    values = [small(checkpoint, tmp_path / name, **settings) for name in ("whole", "killed")]
    run_recipe(build_recipe(values[0]))
    begun: list[int] = []
    fit = video_training._fit
    monkeypatch.setattr(video_training, "_fit", lambda run, index, *more: begun.append(index) or fit(run, index, *more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(2, patch)  # the batch with this index is in the second stage
        run_recipe(build_recipe(values[1]))
    killed = tmp_path / "killed"
    stored = [torch.load(killed / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "1-last")]
    assert [each["global_step"] for each in stored] == [2, 2]
    run_recipe(build_recipe(values[1]))
    assert begun == [0, 1, 1]
    assert_same_results(killed, tmp_path / "whole")
    assert [file.name for file in (killed / "checkpoints").glob("*.ckpt")] == ["1-last.ckpt"]
    (curves,) = (tmp_path / "whole").glob("curves/version_*/metrics.csv")
    rows = list(csv.DictReader(curves.open()))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "whole", killed)]
    assert [[row["step"] for row in each["on_the_way"]] for each in metrics] == [[2, 4], [2, 4]]
    of_stills = [int(row["step"]) for row in rows if row.get("loss/embeddings_of_stills")]
    of_clips = [int(row["step"]) for row in rows if row.get("loss")]
    assert of_stills == [0, 1] and of_clips == [2, 3, 4]


def kill_and_resume(values: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a run after its third batch, and compare what it ends with with a run that was not killed."""
    killed = Path(values["output"])
    kill_at(2, monkeypatch)
    with pytest.raises(Killed):
        run_recipe(build_recipe(values))
    monkeypatch.undo()
    assert 1 <= read_checkpoint(killed)["global_step"] < values["trainer"]["max_steps"]
    run_recipe(build_recipe(values))
    assert_same_results(killed, whole)


def kill_at(batch_index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next training die after a batch."""
    options = video_training.training_options

    def with_kill(*args: Any, **more: Any) -> dict[str, Any]:
        chosen = options(*args, **more)
        return {**chosen, "callbacks": [*chosen["callbacks"], KillAfterBatch(batch_index)]}

    monkeypatch.setattr(video_training, "training_options", with_kill)


def test_averages_survive_a_kill_at_the_end_of_training(
    checkpoint: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last step's checkpoint is written before the averages become the weights
    values = small(checkpoint, tmp_path / "killed", **RUNS["float"])

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WeightAverage, "on_train_end", die)
        with pytest.raises(Killed):
            run_recipe(build_recipe(values))
    run_recipe(build_recipe(values))
    assert_same_results(tmp_path / "killed", runs["float"])


def test_a_resumed_run_goes_on_in_wandb(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline in a second file of the same run, which `wandb sync` uploads as one."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"train": TRAIN_FLOAT, "trainer": {"max_steps": 3, "checkpoint_every": 1}, "log": {"wandb": "offline"}}
    values = small(checkpoint, tmp_path / "run", **settings)
    kill_at(1, monkeypatch)
    with pytest.raises(Killed):
        run_recipe(build_recipe(values))
    wandb.finish()  # a killed process takes it along
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_SILENT", "true")
    time.sleep(1)  # wandb names its folders by the second
    run_recipe(build_recipe(values))
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    for file in files:  # its last record is written shortly after the end of the run
        wait_until(lambda file=file: any(record.WhichOneof("record_type") == "exit" for record in records(file)))
    begun, resumed = (list(records(file)) for file in files)
    for part in (begun, resumed):
        (own,) = [record.run for record in part if record.run.run_id]
        assert own.resume and own.run_id == (tmp_path / "run" / "wandb" / "id").read_text()
    first, second = (steps(part) for part in (begun, resumed))
    assert sorted({*first, *second}) == [0, 1, 2] and max(first) < max(second)


def steps(part: list[Any]) -> list[int]:
    """Training steps whose loss a part of a run logged."""
    rows = [{".".join(item.nested_key): item.value_json for item in record.history.item} for record in part]
    return [int(row["trainer/global_step"]) for row in rows if "loss" in row]
