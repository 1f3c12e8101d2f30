"""A disk that fills up, a damaged file, a folder in which another process works: said in one line, nothing lost."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import HANG_S

from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.recipe import build_recipe
from qsam2.run import RunFolder, alone_in


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/metrics.csv")


def folder_of(path: Path) -> RunFolder:
    return RunFolder(build_recipe({"name": "small", "output": str(path)}))


def test_figures_are_kept_whole_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path).record("float", {"J&F": 1.0})
    before = (tmp_path / "metrics.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="could not be written: No space left on device; make room or give another"):
            folder_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            folder_of(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "recipe.yaml"]
    assert folder_of(tmp_path).metrics["float"] == {"J&F": 1.0}


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


def test_damaged_figures(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "metrics.json").write_text('{"float": {"J&')
    with pytest.raises(UserError, match=r"metrics.json is damaged \(.*\): remove it to run anew"):
        folder_of(tmp_path)


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
    with (
        pytest.raises(UserError, match="file/run cannot be written: Not a directory; make room or give output=PATH"),
        alone_in(tmp_path / "file" / "run"),
    ):
        pass
