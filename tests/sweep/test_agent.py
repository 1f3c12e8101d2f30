"""A sweep with an account: created once, joined again by the same command; and what an agent's run does. No network."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from small_sweep import ACTIVATIONS, COMMAND, GRID, WEIGHTS, write

from qsam2.cli import main
from qsam2.recipe import Recipe


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stands for wandb.ai: takes sweeps, lets agents join."""
    account = SimpleNamespace(created=[], joined=[], refuses=False)

    def sweep(config: dict[str, Any], **more: str | None) -> str:
        if account.refuses:
            raise wandb.errors.CommError("Sweep user not valid\n(code 403)")
        account.created.append({"config": config, **more})
        return "x1y2"

    def agent(sweep_id: str, *, count: int | None, **more: str | None) -> None:
        account.joined.append((sweep_id, count, more))

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "sweep", sweep)
    monkeypatch.setattr(wandb, "agent", agent)
    monkeypatch.chdir(tmp_path)
    return account


def test_the_sweep_is_created_once_and_this_machine_is_its_agent(
    account: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qsam2")
    file, place = str(write(tmp_path, project="mine", entity="us")), {"project": "mine", "entity": "us"}
    for _ in range(2):
        assert main(["sweep", file, "--count", "3", "calibrate.clips=5"]) == 0
    command = [*COMMAND[:-1], "calibrate.clips=5", COMMAND[-1]]
    assert account.created == [{"config": {**GRID, **place, "command": command}, **place}]
    assert account.joined == [("x1y2", 3, place)] * 2
    assert "other machines join with: wandb agent us/mine/x1y2" in caplog.messages
    kept = json.loads(Path("runs/sweeps/small/wandb.json").read_text())
    assert kept["id"] == "x1y2" and yaml.safe_load(Path(file).read_text())["parameters"] == kept["config"]["parameters"]


def test_what_an_account_refuses_and_offline_on_request(
    account: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*flags: str) -> str:
        assert main(["sweep", file, *flags]) == 2
        return capsys.readouterr().err

    file, carried_out = str(write(tmp_path)), []
    account.refuses = True
    assert refused() == f"error: sweep {file}: W&B refuses it: Sweep user not valid (code 403)\n"
    account.refuses = False
    assert "--jobs 2: an agent carries out one run at a time; start another agent instead" in refused("--jobs", "2")
    monkeypatch.setattr("qsam2.sweep.runner.carry_out", lambda *given: carried_out.append(given))
    assert main(["sweep", file, "log.wandb=offline"]) == 0
    assert carried_out and not account.created
    assert main(["sweep", file]) == 0
    write(tmp_path, parameters={WEIGHTS: {"values": [2]}})
    assert "holds another sweep, x1y2; give another folder with --output" in refused()


def test_a_run_of_an_agent_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr("qsam2.pipeline.run_recipe", lambda recipe: recipes.append(recipe) or {"bytes": {}})
    monkeypatch.setenv("WANDB_SWEEP_ID", "x1y2")
    monkeypatch.setenv("WANDB_RUN_ID", "run7")
    monkeypatch.chdir(tmp_path)
    given = [COMMAND[3], f"{WEIGHTS}=3", f"{ACTIVATIONS}=8"]  # as the agent puts it together
    assert main(["train", *given]) == 0
    assert main(["train", *given, "output=there"]) == 0
    assert [recipe.run_folder for recipe in recipes] == [Path("runs/sweeps/x1y2/run7"), Path("there")]
    assert recipes[0].quantize.weights.bits == 3
