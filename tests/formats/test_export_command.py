"""`qsam2 export`: the packed file, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsam2.cli import main


@pytest.fixture
def finished_run(runs: dict[str, Path]) -> Path:
    return runs["ptq"]


@pytest.mark.parametrize("given", ["", "model.safetensors"])
def test_a_packed_file_is_copied_with_its_card(finished_run, tmp_path, capsys, given):
    out = tmp_path / "new" / "folder"
    assert main(["export", str(finished_run / given), "--format", "packed", "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["card.json", "card.md", "model.safetensors"]
    said = capsys.readouterr().out
    for file in out.iterdir():
        assert file.read_bytes() == (finished_run / file.name).read_bytes()
        assert f"{file}  {file.stat().st_size:,} bytes" in said


def test_what_cannot_be_exported_is_refused_in_one_line(finished_run, tmp_path, capsys):
    unfinished, file, out = tmp_path / "run", tmp_path / "file", tmp_path / "out"
    unfinished.mkdir()
    file.write_text("")
    not_finished = "holds no model.safetensors: the run is not finished"
    for model, format, folder, more, message in (
        (unfinished, "packed", out, (), not_finished),
        (unfinished, "onnx", out, (), not_finished),
        ("nano", "packed", out, (), "nano is a float model"),
        (finished_run, "packed", out, ("memory.cache=true",), "'memory.cache=true' changes nothing in a packed file"),
        ("nano", "onnx", file, (), "is a file; give a folder"),
        (finished_run, "packed", file / "below", (), "Not a directory"),
        ("nano", "tflite", out, (), "invalid choice: 'tflite'"),
    ):
        assert main(["export", str(model), "--format", format, "--out", str(folder), *more]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_damaged_packed_file_is_not_handed_on(finished_run, tmp_path, capsys):
    data = bytearray((finished_run / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path), "--format", "packed", "--out", str(out)]) == 2
    assert "is damaged" in capsys.readouterr().err and not out.exists()
