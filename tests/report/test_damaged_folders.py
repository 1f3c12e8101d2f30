"""Run folders that are damaged, come from elsewhere, or cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kept_run import fill_disk, write_run
from messages import Message

from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.report.page import render
from qsam2.report.read import as_runs_write, read_run


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("recipe.yaml", b"name: run\nnew_key: 1\n", "holds a run of another version (unknown recipe key 'new_key'"),
        ("metrics.json", b'{"seconds": {', "metrics.json is damaged ("),
        ("metrics.json", b"[1]", "metrics.json holds no metrics of a run"),
        ("report/layers.json", b"{", "layers.json is damaged ("),
        ("report/clips.json", b"\xff\xfe", "clips.json is damaged ("),
        ("curves/version_0/metrics.csv", b"step,loss\n1,x\n", "metrics.csv is damaged ("),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path: Path, file: str, content: bytes, says: str) -> None:
    path = write_run(tmp_path / "run")
    (path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        render(read_run(path))
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run")
    (path / "report.html").write_text("old")
    fill_disk(monkeypatch)
    assert main(["report", str(path)]) == 2
    assert "report.html could not be written: No space left on device; make room" in capsys.readouterr().err
    assert (path / "report.html").read_text() == "old" and not list(path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["metrics.json", "report/layers.json", "report/clips.json", "report/memory.json"])
def test_json_of_another_shape_is_refused_in_one_line(tmp_path: Path, name: str, message: Message) -> None:
    run = write_run(tmp_path / "run")
    kept = (run / name).read_text()
    other = {"float": 3, "layers": 3, "clips": 3, "frames": 3, "seconds": 3}
    for text in (json.dumps(other), "[" * 5000, '"\\ud800"', kept[:-9]):
        (run / name).write_text(text)
        with pytest.raises(UserError) as error:
            read = read_run(run)
            with as_runs_write([read]):
                render(read)
        message(error)


def test_figures_that_cannot_be_divided_are_one_line(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    with pytest.raises(UserError, match=r"run: the figures are not as a run writes them \("), as_runs_write([run]):
        raise ZeroDivisionError


def test_a_comparison_with_figures_of_another_shape_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    (run / "metrics.json").write_text('{"float": 3, "quantized": 3, "seconds": {}}')
    assert main(["report", str(run)]) == main(["report", str(run), str(other)]) == 2
    page, comparison = capsys.readouterr().err.splitlines()
    assert page.startswith(f"error: {run}: the figures are not as a run writes them (")
    assert comparison.startswith(f"error: {run}, {other}: the figures are not as a run writes them (")
