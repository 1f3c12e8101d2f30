"""A run's folder: whose run it holds, a disk that fills up, a damaged file, another process at work in it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from waiting import HANG_S

import qsam2.formats.card
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.output import write_tensors, write_text
from qsam2.recipe import build_recipe
from qsam2.run import RunFolder, alone_in
from qsam2.train.trainer import SafeCheckpointIO


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/metrics.csv")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A recipe whose run has begun in its folder."""
    values = {"output": str(tmp_path / "run"), "quantize": {"weights": {"method": "lsc", "bits": 4}}, "train": {}}
    RunFolder(build_recipe(values)).record("float", {"J&F": 1.0})
    return values


def rewrite(values: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    """Change the recipe that a run's folder holds."""
    file = Path(values["output"]) / "recipe.yaml"
    written = yaml.safe_load(file.read_text())
    change(written)
    file.write_text(yaml.safe_dump(written))


# Whose run it is


def test_keys_that_were_added_since_have_their_defaults(values: dict[str, Any]) -> None:
    rewrite(
        values, lambda recipe: [recipe["trainer"].pop("compile"), recipe["train"].pop("dropout"), recipe.pop("log")]
    )
    assert RunFolder(build_recipe(values)).metrics["float"] == {"J&F": 1.0}
    rewrite(values, lambda recipe: recipe["trainer"].pop("compile"))
    with pytest.raises(UserError, match=r"holds a run of another recipe \(it differs in trainer.compile\)"):
        RunFolder(build_recipe(values, ["trainer.compile=on"]))


def test_another_recipe_is_refused_once_a_run_began(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"differs in quantize.weights.bits, train.lr\); give another folder with outp"):
        RunFolder(build_recipe(values, ["quantize.weights.bits=3", "train.lr=1"]))
    (Path(values["output"]) / "metrics.json").unlink()
    RunFolder(build_recipe(values, ["quantize.weights.bits=3"]))
    assert "bits: 3" in (Path(values["output"]) / "recipe.yaml").read_text()


@pytest.mark.parametrize("lost", ["report.html", "model.safetensors", "metrics.json"])
def test_a_run_that_lost_a_result_is_not_finished(values: dict[str, Any], lost: str) -> None:
    """Messages about such a file say to run the recipe again."""
    folder = RunFolder(build_recipe(values))
    for name in ("report.html", "model.safetensors"):
        (folder.path / name).write_text("")
    assert folder.finished
    (folder.path / lost).unlink()
    assert not RunFolder(build_recipe(values)).finished


def test_a_run_of_a_version_that_had_other_keys_is_refused(values: dict[str, Any]) -> None:
    rewrite(values, lambda recipe: recipe.update(gone=1))
    with pytest.raises(UserError, match=r"another version \(unknown recipe key 'gone'.*\); give output=PATH"):
        RunFolder(build_recipe(values))


def test_damaged_figures(values: dict[str, Any]) -> None:
    (Path(values["output"]) / "metrics.json").write_text('{"float": {"J&')
    with pytest.raises(UserError, match=r"metrics.json is damaged \(.*\): remove it to run anew"):
        RunFolder(build_recipe(values))


# Permissions


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_that_new_ones_have(umask: int, tmp_path: Path) -> None:
    """safetensors writes files that their owner alone can read."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
        write_text(tmp_path / "a.txt", "a")
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})  # over another one
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


# A full disk


@pytest.mark.parametrize("at", ["pathlib.Path.write_bytes", "os.replace"])
def test_figures_are_kept_whole_and_the_run_goes_on_later(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    file = Path(values["output"]) / "metrics.json"
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(at, full)
        with pytest.raises(UserError, match="could not be written: No space left on device; make room or give another"):
            RunFolder(build_recipe(values))
    assert file.read_bytes() == before
    assert sorted(file.name for file in file.parent.iterdir()) == ["metrics.json", "recipe.yaml"]
    assert RunFolder(build_recipe(values)).metrics["float"] == {"J&F": 1.0}


def test_what_a_library_could_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qsam2.pipeline.run_recipe", full)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("name: x\n")
    assert main(["train", "r.yaml"]) == 2
    said = "error: no room on the disk for /there/metrics.csv: make some and give the same command again\n"
    assert capsys.readouterr().err == said

    def other(_: Any) -> None:
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr("qsam2.pipeline.run_recipe", other)
    with pytest.raises(OSError, match="bad"):  # not the user's to put right
        main(["train", "r.yaml"])


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The operating system refuses to let a file grow larger, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_goes_on_from_its_last_checkpoint_whatever_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    prompts = "{point: 0, box: 0, conditioning_frames: 1, correction_frames: 1, correction_clicks: 1}"
    recipe.write_text(f"train: {{lr: 1e-4, prompts: {prompts}}}")
    command = ["train", str(recipe), "debug=fast", "model.image_size=64", "model.checkpoint=null", f"output={run}"]
    command += ["data.train=moving_objects:2:train", "data.val=moving_objects:1:val"]
    command += ["trainer.max_steps=2", "trainer.checkpoint_every=1"]
    last = run / "checkpoints/last.ckpt"
    save, save_weights = SafeCheckpointIO.save_checkpoint, qsam2.formats.card.save_weights

    def only_the_first(self: SafeCheckpointIO, checkpoint: dict, path: object, storage_options: object = None) -> None:
        with contextlib.nullcontext() if checkpoint["global_step"] == 1 else largest_file(1_000_000):
            save(self, checkpoint, path, storage_options)

    def no_room(*arguments: object) -> None:
        with largest_file(1_000_000):
            save_weights(*arguments)

    def message_without_room(holder: Any, name: str, function: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, function)
            assert main(command) == 2
        message = capsys.readouterr().err.split("\n")[-2]
        assert "File too large" in message
        return message

    message = message_without_room(SafeCheckpointIO, "save_checkpoint", only_the_first)
    assert message.startswith(f"error: {last} could not be written: ")
    assert message.endswith("the previous one is kept: run the same command again to resume")
    assert torch.load(last, weights_only=True)["global_step"] == 1
    assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]

    message = message_without_room(qsam2.formats.card, "save_weights", no_room)
    assert message.startswith(f"error: {run / 'model.safetensors'} could not be written: ")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert not list(run.glob("model.safetensors*"))

    assert main(command) == 0
    assert (run / "model.safetensors").is_file() and json.loads((run / "metrics.json").read_text())["bytes"]


# Other processes


def test_one_process_at_a_time_in_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qsam2")
    order, begun, end = [], threading.Event(), threading.Event()

    def first() -> None:
        with alone_in(tmp_path / "run"):
            begun.set()
            end.wait(HANG_S)
            order.append("first")

    def second() -> None:
        with alone_in(tmp_path / "run"):
            order.append("second")

    threads = [threading.Thread(target=work) for work in (first, second)]
    threads[0].start()
    assert begun.wait(HANG_S)
    threads[1].start()
    while "another process is at work" not in caplog.text and threads[1].is_alive():
        end.wait(0.02)
    end.set()
    for thread in threads:
        thread.join(HANG_S)
    assert order == ["first", "second"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        expected = f"{folder} cannot be written: {reason}; make room or give output=PATH"
        with pytest.raises(UserError, match=expected), alone_in(tmp_path / folder):
            pass
