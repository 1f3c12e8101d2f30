"""The stored model of a run: what a resumed run takes from it, and that a run that finishes does without it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qsam2.errors import UserError
from qsam2.stored_model import StoredModel


def run_of(folder: Path) -> Any:
    run = SimpleNamespace(folder=SimpleNamespace(stages=folder, carried_out=[]), model=nn.Linear(2, 2), latent={})
    run.prepared = []
    run.prepare_inference = lambda: run.prepared.append(float(run.model.weight[0, 0]))
    return run


def fills_weights(run: Any) -> None:
    run.folder.carried_out.append("fills weights")
    nn.init.constant_(run.model.weight, 3.0)


def not_in_the_recipe(run: Any) -> None:
    pass


def test_a_resumed_run_takes_what_a_stage_made(tmp_path: Path) -> None:
    stored = StoredModel(run_of(tmp_path))
    stored.carry_out(not_in_the_recipe)
    assert not stored.file.exists()
    stored.carry_out(fills_weights)
    run = run_of(tmp_path)
    StoredModel(run).carry_out(fills_weights)
    assert run.prepared == [3.0] and run.folder.carried_out == []


def test_a_model_that_cannot_be_stored_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr("qsam2.stored_model.SafeCheckpointIO.save_checkpoint", full)
    stored = StoredModel(run_of(tmp_path))
    stored.carry_out(fills_weights)
    assert stored.finished == ["fills_weights"]
    assert caplog.messages == ["no room; if this run is stopped now, it is calibrated anew"]


def test_of_several_processes_the_first_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsam2.stored_model.is_first_rank", lambda: False)
    stored = StoredModel(run_of(tmp_path))
    stored.carry_out(fills_weights)
    assert not stored.file.exists()


@pytest.mark.parametrize("content", [{"model": {}}, {"stages": []}, [1], b"no checkpoint"])
def test_a_file_of_something_else_is_damaged(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=r"model.ckpt is damaged .*: remove it, and the run is calibrated anew$"):
        StoredModel(run_of(tmp_path))
