"""`qsam2 benchmark`: what its three kinds measure and write, on small models, and their messages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from qsam2.benchmark import measure, quantization, remembered_frames, tracked_frame
from qsam2.benchmark.remembered_frames import SETTINGS, attention_macs, benchmark_memory
from qsam2.benchmark.tracked_frame import COLUMNS, ENGINES, PARTS, Engine, Setting, benchmark_tracking, markdown_table
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.fast.model import FastSAM2
from qsam2.models import SAM2
from qsam2.models.sam2 import model_config

SMALL = ["--size", "nano", "--image-size", "64", "--repeats", "1"]
TOKENS = (64 // 16) ** 2


@pytest.fixture
def measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Carries out a benchmark on a small model: (content of its JSON, rows of its table)."""

    def run(kind: str, *flags: str) -> tuple[dict[str, Any], list[list[str]]]:
        out = tmp_path / "new" / "figures.json"
        assert main(["benchmark", kind, *SMALL, *flags, "--json", str(out)]) == 0
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return json.loads(out.read_text()), [line.strip("| ").split(" | ") for line in table[1:]]

    return run


def test_quantizers(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_UPS", 0)
    prompts = quantization.RECIPE.prompts.model_copy(update={"correction_clicks": 1})
    monkeypatch.setattr(quantization, "RECIPE", quantization.RECIPE.model_copy(update={"prompts": prompts}))
    result, table = measured("quantizers", "--frames", "2", "--compile", "off", "--peers", "aten")
    timed, steps, ours = result["operation"], result["train_step"], result["float_step"]
    assert timed.keys() == {"qsam2", "qsam2_lsc", "aten"} and steps.keys() == {"qsam2", "qsam2_linear", "aten"}
    for row in timed.values():
        for key in ("forward_ms", "backward_ms"):
            assert row[key] == pytest.approx(row["weight"][key] + row["activation"][key])
            assert min(row["weight"][key], row["activation"][key]) > 0
    for row in steps.values():
        assert row["time_ratio"] == pytest.approx(row["time_s"] / ours["time_s"]) and row["time_s"] > 0
        assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / ours["peak_bytes"])
        assert row["memory_ratio"] > 1  # weights: all of them hold a quantized copy that the float step does not
    assert steps["qsam2_linear"]["memory_ratio"] < steps["aten"]["memory_ratio"]
    assert result["shapes"] == {"weight": [512, 128], "activation": [2, 4, 4, 128], "clip": [2, 1, 3, 64, 64]}
    repeats = {"operation": quantization.OPERATION_ROUNDS, "train_step": 1}
    assert (result["settings"]["repeats"], result["left_out"]) == (repeats, {})
    assert result["versions"].keys() >= {"python", "torch"} and result["cpu"]
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["threads"] == torch.get_num_threads()
    assert [row[0] for row in table] == ["qsam2", "qsam2_lsc", "aten", "qsam2_linear"]
    assert table[0][1] == f"{timed['qsam2']['forward_ms']:.2f}"
    assert table[0][4] == f"{steps['qsam2']['memory_ratio']:.2f}"


def test_memory(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("sam2", "bounded", "cache", "adaptive 2", "pool 3")
    monkeypatch.setattr(remembered_frames, "SETTINGS", {name: SETTINGS[name] for name in few})
    result, table = measured("memory", "--frames", "8")
    assert list(result) == [row[0] for row in table] == list(few)
    pointers = 2 * (8 + 3)  # two tokens each, of all frames before the last
    assert result["sam2"]["keys"] == result["bounded"]["keys"] == result["cache"]["keys"] == 7 * TOKENS + pointers
    assert result["adaptive 2"]["keys"] == 2 * TOKENS + pointers
    assert result["bounded"]["state_bytes"] < result["cache"]["state_bytes"] < result["sam2"]["state_bytes"]
    assert all(0 < row["attention_seconds"] < row["seconds_per_frame"] for row in result.values())
    macs = [result[name]["attention_macs"] for name in ("adaptive 2", "cache", "sam2")]
    assert macs == sorted(set(macs))
    assert table[0][2] == "1.00"  # times faster than itself

    sizes = []
    monkeypatch.setattr(remembered_frames, "SETTINGS", {"cache": SETTINGS["cache"]})
    for precision in ("32-true", "bf16-mixed"):
        given: dict[str, Any] = {"size": "nano", "image_size": 64, "objects": 1, "device": "cpu"}
        figures = benchmark_memory(**given, frames=1, repeats=1, precision=precision)
        sizes.append(figures["cache"]["state_bytes"])
    assert sizes[1] < sizes[0]


def test_multiply_adds_and_ways_of_sharing(model: SAM2) -> None:
    keys, channels, layers = 100, 128, 2
    itself = 2 * TOKENS * TOKENS * channels
    assert attention_macs(model, keys, channels) == layers * (itself + 2 * TOKENS * keys * channels)
    assert attention_macs(model, keys, 64) == layers * (itself + TOKENS * keys * (channels + 64))
    assert SETTINGS["sam2"].reads_anew is SETTINGS["sam2"].bounded is False
    ways = ("none", "adaptive", "oldest", "stride", "pool", "sparse", "synthesis")
    assert {setting.sharing for setting in SETTINGS.values()} == {*ways}


def test_tracking(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are fast models; behind a full bank they read all keys, or those of three frames."""
    runs: dict[str, Any] = {}
    names = ["sam2", "sam2 bf16", "qsam2", "qsam2 exact"]
    for name in names:

        def start(setting: Setting, name: str = name, engine: Engine = ENGINES[name]) -> Any:
            runs[name] = engine.start(setting)
            return runs[name]

        monkeypatch.setitem(ENGINES, name, Engine(start))
    result, table = measured("tracking", "--engines", *names)
    assert list(result) == [row[0] for row in table] == names and table[0][2] == "1.00"
    for row in result.values():
        assert tuple(row) == COLUMNS == ("seconds_per_frame", "encoder_seconds", "memory_seconds", "decoder_seconds")
        parts = [row[f"{part}_seconds"] for part in PARTS]
        assert all(part > 0 for part in parts) and sum(parts) < row["seconds_per_frame"]
    assert [isinstance(runs[name].model, FastSAM2) for name in names] == [False, False, True, True]
    keys = [runs[name].model.memory_reader.keys for name in ("qsam2 exact", "qsam2")]
    assert keys == [7 * TOKENS + 2 * 7, 3 * TOKENS + 2 * 7]  # and two tokens of each pointer


def test_other_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported, quantized by ONNX Runtime, tracked; OpenVINO where it is installed."""

    def few_blocks(size: str, *, image_size: int) -> SAM2:
        config = model_config(size, image_size=image_size)
        config.image_encoder.trunk.stages, config.memory_attention.num_layers = [1, 1, 1, 1], 1
        return instantiate(config).eval()

    monkeypatch.setattr(measure, "build_sam2", few_blocks)  # the exporter takes half a minute for all of nano
    there = [name for name in ENGINES if "runtime" in name or "openvino" in name]
    chosen = [name for name in there if ENGINES[name].missing() is None]
    assert "onnxruntime int8" in chosen
    result = benchmark_tracking(size="nano", image_size=64, repeats=1, engines=chosen)
    assert list(result) == chosen and all(value > 0 for row in result.values() for value in row.values())
    assert "| - |" in markdown_table(result)  # nothing to be faster than


def test_left_out_engines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    line = markdown_table({"sam2": dict.fromkeys(COLUMNS, 1.0)}).splitlines()[-1]
    assert line.startswith("openvino int8 is left out, it needs ")
    assert "nncf" in line and line.endswith(": pip install openvino nncf 'qsam2[onnx]'")
    with pytest.raises(UserError, match=r"^--engines 'openvino int8' needs .*nncf: pip install openvino nncf"):
        benchmark_tracking(size="nano", image_size=64, repeats=1, engines=["openvino int8"])
    monkeypatch.setattr(tracked_frame.shutil, "which", lambda name: None)
    assert ENGINES["sam2 compile"].missing() == "a C++ compiler" and ENGINES["sam2"].missing() is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quantizers --peers brevitsa",
         "--peers brevitsa: there is no such peer, choose from plain_lsq, aten, brevitas, torchao; did you mean "
         "'brevitas'?"),
        ("quantizers --frames 0", "--frames 0: give a whole number from 1 up"),
        ("quantizers --repeats -1", "--repeats -1: give a whole number from 1 up"),
        ("quantizers --peers aten --size huge", "model.size='huge' is unknown: choose one of nano,"),
        ("quantizers --peers aten --size nano --image-size 100",
         "model.image_size=100 is impossible: give a multiple of 32"),
        ("quantizers --repeats two",
         "argument --repeats: invalid int value: 'two'; see qsam2 benchmark quantizers --help"),
        ("quantizers --json .", "--json .: is a folder; give the path of a file"),
        ("memory --frames 0", "--frames 0: give a whole number from 1 up"),
        ("memory --repeats 0", "--repeats 0: give a whole number from 1 up"),
        ("memory --objects -1", "--objects -1: give a whole number from 1 up"),
        ("memory --precision 8", "--precision 8: choose one of 32-true, bf16-mixed"),
        ("memory --device tpu", "--device tpu: choose cpu, or cuda where PyTorch finds a GPU"),
        ("memory --size huge", "model.size='huge' is unknown"),
        ("tracking --repeats 0", "--repeats 0: give a whole number from 1 up"),
        ("tracking --engines qsam", "--engines 'qsam' is unknown: choose from sam2, sam2 bf16, sam2 compile, "),
        ("tracking --size huge --engines sam2", "model.size='huge' is unknown"),
        ("tracking --image-size 65 --engines sam2", "model.image_size=65 is impossible"),
        *((f"{kind} a.b=1", "'a.b=1' is a key of a recipe, and this benchmark reads none: leave it out")
          for kind in ("quantizers", "memory", "tracking")),
    ],
)  # fmt: skip
def test_messages(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert "--engines" not in line or "qsam" not in line or error.endswith("; did you mean 'qsam2'?\n")
