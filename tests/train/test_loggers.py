"""Loggers of a run: W&B, whose errors cost nothing but its log, and what is logged of step sizes and rates."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from kept_run import QAT, write_run
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn

from qsam2.models import SAM2
from qsam2.output import code_version
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.train import TrainRecipe
from qsam2.report import stage
from qsam2.report.read import read_run
from qsam2.train.loggers import LogScales, Wandb, build_loggers, has_wandb_key
from qsam2.train.optimizer import parameter_groups, rates


class FakeRun:
    """Stands for a run of W&B; fails in the methods that are named."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.id = "x"
        self.config = self
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def _call(self, name: str) -> None:
        if name in self.failing:
            raise OSError(30, "Read-only file system")

    def log(self, values: dict[str, Any], **_: Any) -> None:
        self._call("log")
        self.logged.append(values)

    def update(self, *_: Any, **__: Any) -> None:
        self._call("update")

    def log_artifact(self, *_: Any) -> None:
        self._call("log_artifact")

    def finish(self) -> None:
        self._call("finish")
        self.finished = True

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass


def recipe_of(folder: Path, **log: Any) -> Recipe:
    return build_recipe({"output": str(folder), "log": {"wandb": "offline", **log}})


def logger_of(folder: Path, run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> Wandb:
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "run", None)
    _, logger = build_loggers(recipe_of(folder))
    assert isinstance(logger, Wandb)
    return logger


def test_an_error_in_training_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun("log")
    logger = logger_of(tmp_path, run, monkeypatch)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.log_hyperparams({"a": 1})
    assert caplog.messages == [
        "Weights & Biases: OSError: [Errno 30] Read-only file system; the run goes on and is not logged there any more"
    ]


@pytest.mark.parametrize("error", [wandb.errors.CommError("no network"), OSError(28, "No space left on device"),
                                   wandb.errors.UsageError("no key"), RuntimeError("service died")])  # fmt: skip
def test_an_error_at_the_start_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    logger = logger_of(tmp_path, FakeRun(), monkeypatch)

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    logger.experiment.log({"loss": 1.0})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    assert len(caplog.messages) == 1 and str(error) in caplog.text and logger.failed


def test_a_logger_that_cannot_be_built_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qsam2.train.loggers.Wandb", lambda **_: 1 / 0)
    (logger,) = build_loggers(recipe_of(tmp_path))
    assert isinstance(logger, CSVLogger)
    assert caplog.messages == ["Weights & Biases: division by zero; the run is not logged there"]


@pytest.mark.parametrize("failing", ["log", "log_artifact", "finish", None])
def test_an_error_at_the_end_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str | None
) -> None:
    kept = read_run(write_run(tmp_path / "run", QAT))
    for name in stage.FILES:
        (kept.path / name).touch()
    run = FakeRun(*([failing] if failing else []))
    logger = logger_of(kept.path, run, monkeypatch)
    stage.log_results([logger], kept.recipe, kept.metrics, [Image.new("RGB", (8, 8))])
    assert run.finished == (failing is None)
    assert [record.levelno for record in caplog.records] == ([logging.WARNING] if failing else [])
    if failing is None:
        logged = {key: value for values in run.logged for key, value in values.items()}
        assert logged["quantized/versus_float/low"] == kept.metrics["quantized"]["versus_float"]["low"]
        assert "moved" in logged and "quantized/seconds_per_frame" not in logged


def test_a_difference_without_an_interval_is_logged_without_one() -> None:
    block = {"J&F": 1.0, "versus_float": {"difference": -1.0, "low": None, "high": None, "unit": "videos"}}
    assert stage.final_figures({"quantized": block}) == {
        "quantized/J&F": 1.0, "quantized/versus_float/difference": -1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quantize", "metrics", "name"),
    [
        ({"weights": {"method": "lsc", "bits": 4}, "activations": {"method": "lsc", "bits": 8}}, {}, "nano-w4a8"),
        ({"weights": {"method": "lsc", "bits": 2}}, {}, "nano-w2"),
        ({"activations": {"method": "lsc", "bits": 8}}, {}, "nano-a8"),
        ({"weights": {"method": "lsc", "bits": 4}}, {"allocated_bits": {"average": 3.499}}, "nano-w3.5"),
    ],
)
def test_a_model_is_named_by_size_and_bits(quantize: Any, metrics: dict[str, Any], name: str) -> None:
    assert stage.model_name(build_recipe({"quantize": quantize}), metrics) == name


def test_what_a_recipe_says_of_the_run_reaches_wandb(tmp_path: Path) -> None:
    values = {"entity": "us", "job_type": "qat", "tags": "small", "notes": "a note", "group": "g", "project": "p"}
    recipe = build_recipe({"output": str(tmp_path), "data": {"root": str(tmp_path / "data")},
                           "log": {"wandb": "offline", **values}})  # fmt: skip
    _, logger = build_loggers(recipe)
    assert isinstance(logger, Wandb)
    assert {key: logger._wandb_init[key] for key in values} == {**values, "tags": ["small"]}
    config = logger._wandb_init["config"]
    assert config["output"] is None and config["data"]["root"] is None
    assert config["qsam2"] == code_version() and logger._wandb_init["resume"] == "allow"


@pytest.mark.parametrize(
    ("chosen", "key", "offline"),
    [("auto", True, False), ("auto", False, True), ("online", False, False), ("offline", True, True)],
)
def test_where_a_run_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, key: bool, offline: bool
) -> None:
    monkeypatch.setattr("qsam2.train.loggers.has_wandb_key", lambda: key)
    _, logger = build_loggers(recipe_of(tmp_path, wandb=chosen))
    assert isinstance(logger, Wandb) and logger._offline == offline
    (csv,) = build_loggers(recipe_of(tmp_path, wandb="off"))
    assert isinstance(csv, CSVLogger)


def test_a_resumed_run_has_its_id_and_a_run_of_an_agent_the_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    ids = [build_loggers(recipe_of(folder))[1].version for folder in (tmp_path, tmp_path, tmp_path / "other")]
    assert ids[0] == ids[1] != ids[2]
    monkeypatch.setenv("WANDB_RUN_ID", "run7")
    assert build_loggers(recipe_of(tmp_path))[1].version == "run7"


def test_step_sizes_of_single_quantizers_stay_in_the_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    logger = logger_of(tmp_path, run, monkeypatch)
    logger.log_metrics({"scale/a": 1.0, "loss": 2.0}, 0)
    logger.log_metrics({"scale/a": 1.0}, 1)
    assert [set(values) for values in run.logged] == [{"loss", "trainer/global_step"}]


def test_step_sizes_are_logged_as_multiples_of_their_first_also_after_a_stop() -> None:
    scales = {"a": 1.0, "b": 2.0, "c": 4.0}
    fakes = {name: SimpleNamespace(scale=torch.tensor([value]), role="weight") for name, value in scales.items()}
    fakes["d"] = SimpleNamespace(scale=torch.tensor([3.0]), role="activation")
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=lambda values: logged.update({k: float(v) for k, v in values.items()}))
    trainer: Any = SimpleNamespace(global_step=0)
    before = LogScales(fakes, 2)  # type: ignore[arg-type]
    before.on_train_batch_end(trainer, module)
    assert logged["step_size/weights_p50"] == logged["step_size/activations_p90"] == 1.0
    resumed = LogScales(fakes, 2)  # type: ignore[arg-type]
    resumed.load_state_dict(before.state_dict())
    fakes["b"].scale, fakes["c"].scale = torch.tensor([4.0]), torch.tensor([12.0])
    resumed.on_train_batch_end(SimpleNamespace(global_step=1), module)  # type: ignore[arg-type]
    assert logged["scale/b"] == 2.0
    resumed.on_train_batch_end(SimpleNamespace(global_step=2), module)  # type: ignore[arg-type]
    assert logged["scale/b"] == 4.0 and logged["step_size/weights_p50"] == 2.0
    assert logged["step_size/weights_p90"] == pytest.approx(2.8) and logged["step_size/activations_p50"] == 1.0


def test_rates_are_named(model: SAM2) -> None:
    recipe = TrainRecipe(lr=1e-3, image_encoder_lr=1e-4, layer_decay=0.5)
    head = {"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-2, "role": "imagenet heads"}
    quantizers = ["no_mem_embed"]
    found = rates([*parameter_groups(model, recipe, quantizers), head])
    assert found == {"image_encoder": 1e-4, "weights": 1e-3, "quantizers": 1e-3, "imagenet heads": 1e-2}
    same = TrainRecipe(lr=1e-4, image_encoder_lr=1e-4, layer_decay=1)
    assert rates(parameter_groups(model, same)) == {"image_encoder": 1e-4, "weights": 1e-4}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"machine", None])
def test_a_netrc_that_cannot_be_read_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    file = tmp_path / "netrc"
    file.mkdir() if content is None else file.write_bytes(content)
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://[")
    assert not has_wandb_key()


def test_a_key_of_weights_and_biases_is_found_where_wandb_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_wandb_key()
