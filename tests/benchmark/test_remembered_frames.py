"""The benchmark of memory on a small model: what it measures, and that its command writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_videos import SIZE_PX

from qsam2.benchmark import remembered_frames as memory
from qsam2.benchmark.remembered_frames import SETTINGS, attention_macs, benchmark_memory, markdown_table
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.models import SAM2

GIVEN = {"size": "nano", "image_size": SIZE_PX, "objects": 1, "frames": 8, "repeats": 1, "precision": "32-true"}
GIVEN |= {"device": "cpu"}
TOKENS = (SIZE_PX // 16) ** 2


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("sam2", "bounded", "cache", "adaptive 2", "pool 3")
    monkeypatch.setattr(memory, "SETTINGS", {name: SETTINGS[name] for name in few})
    out = tmp_path / "folder" / "memory.json"
    flags = ["--size", "nano", "--image-size", str(SIZE_PX), "--frames", "8", "--repeats", "1", "--json", str(out)]
    assert main(["benchmark", "memory", *flags]) == 0
    result = json.loads(out.read_text())
    assert list(result) == list(few)
    pointers = 2 * (8 + 3)  # two tokens each, of all frames before the last
    assert result["sam2"]["keys"] == result["bounded"]["keys"] == result["cache"]["keys"] == 7 * TOKENS + pointers
    assert result["adaptive 2"]["keys"] == 2 * TOKENS + pointers
    assert result["bounded"]["state_bytes"] < result["cache"]["state_bytes"] < result["sam2"]["state_bytes"]
    for row in result.values():
        assert 0 < row["attention_seconds"] < row["seconds_per_frame"]
    macs = [result[name]["attention_macs"] for name in ("adaptive 2", "cache", "sam2")]
    assert macs == sorted(set(macs))
    table = capsys.readouterr().out
    assert all(f"| {name} | " in table for name in few)
    assert markdown_table(result).splitlines()[4].split("|")[3].strip() == "1.00"


def test_multiply_adds(model: SAM2) -> None:
    tokens, keys, channels, layers = TOKENS, 100, 128, 2
    itself = 2 * tokens * tokens * channels
    assert attention_macs(model, keys, channels) == layers * (itself + 2 * tokens * keys * channels)
    assert attention_macs(model, keys, 64) == layers * (itself + tokens * keys * (channels + 64))


def test_settings_are_those_of_the_issue() -> None:
    assert SETTINGS["sam2"].reads_anew is SETTINGS["sam2"].bounded is False
    assert {setting.sharing for setting in SETTINGS.values()} == {
        *("none", "adaptive", "oldest", "stride", "pool", "sparse", "synthesis")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "--frames 0: give a whole number from 1 up"),
        ({"repeats": 0}, "--repeats 0: give a whole number from 1 up"),
        ({"objects": -1}, "--objects -1: give a whole number from 1 up"),
        ({"precision": "8"}, "--precision 8: choose one of 32-true, bf16-mixed"),
        ({"device": "tpu"}, "--device tpu: choose cpu, or cuda where PyTorch finds a GPU"),
        ({"size": "huge"}, "model.size='huge' is unknown"),
    ],
)
def test_impossible_numbers(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        benchmark_memory(**{**GIVEN, **change})  # type: ignore[arg-type]


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SETTINGS", {"cache": SETTINGS["cache"]})
    sizes = []
    for precision in ("32-true", "bf16-mixed"):
        result = benchmark_memory(**{**GIVEN, "frames": 1, "precision": precision})  # type: ignore[arg-type]
        sizes.append(result["cache"]["state_bytes"])
    assert sizes[1] < sizes[0]
