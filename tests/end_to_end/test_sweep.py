"""A local sweep of whole runs: killed in the middle, resumed, and read back from what it logged offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import FLOAT, ROOT, W4A4, small
from waiting import HANG_S, wait_until
from wandb_file import read_run, records

BITS = "quantize.weights.bits"
NUMBERS = [f"{index:03d}" for index in range(4)]


@pytest.fixture(scope="module")
def sweep(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of four calibrations: of weights at 2 and 4 bits, of activations at 4 and 8."""
    folder = tmp_path_factory.mktemp("sweep")
    values = small(checkpoint, folder, quantize=W4A4)
    values = {key: value for key, value in values.items() if key not in ("output", "log", "trainer")}
    values["trainer"] = {**FLOAT["trainer"], "max_steps": 1}
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    definition = {
        "name": "four",
        "program": "train.py",
        "command": ["${env}", "${interpreter}", "${program}", str(folder / "base.yaml"), "${args_no_hyphens}"],
        "method": "grid",
        "metric": {"name": "quantized/fidelity", "goal": "maximize"},
        "parameters": {BITS: {"values": [2, 4]}, "quantize.activations.bits": {"values": [4, 8]}},
    }
    (folder / "four.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def killed(sweep: Path) -> dict[Path, int]:
    """What was finished when a kill -9 ended the sweep in its second run, and when it was written."""
    process = begin(sweep)
    second = sweep / "out" / "001" / "log.txt"
    wait_until(lambda: second.is_file() and "score float (" in second.read_text(), process)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "the sweep ended before it could be killed"
    first = sweep / "out" / "000"
    # The service of W&B may still close its own log
    left_out = (".lock", "debug-core.log")
    return {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file() and file.name not in left_out}


@pytest.fixture(scope="module")
def said(sweep: Path, killed: dict[Path, int]) -> str:
    """What the same command says when it carries out the rest."""
    process = begin(sweep, "--jobs", "2")
    out, err = process.communicate(timeout=3 * HANG_S)
    assert process.returncode == 0, err[-3000:]
    return out + err


def begin(sweep: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qsam2", "sweep", str(sweep / "four.yaml"), "--output", str(sweep / "out"), *flags],
        cwd=sweep,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", "NETRC": "none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_nothing_that_was_finished_is_repeated(sweep: Path, killed: dict[Path, int], said: str) -> None:
    assert {file: file.stat().st_mtime_ns for file in killed} == killed
    assert "4 runs, 3 to come" in said and ", 000" not in said
    for number in NUMBERS:
        assert len(list((sweep / "out" / number).glob("wandb/offline-run-*"))) == 1
    begun = [(sweep / "out" / number / "log.txt").read_text().count("convert ...") for number in NUMBERS]
    assert begun == [1, 2, 1, 1]  # that of the kill stopped with the sweep


def test_the_table_is_sorted_and_names_the_best(sweep: Path, said: str) -> None:
    results = json.loads((sweep / "out" / "sweep.json").read_text())
    found = [run["metric"] for run in results["runs"]]
    assert found == sorted(found, reverse=True) and {run["state"] for run in results["runs"]} == {"finished"}
    figures = [metrics(sweep, run["number"])["quantized"]["fidelity"] for run in results["runs"]]
    assert found == pytest.approx(figures)
    assert f"best: {results['best']}" in said and f"{BITS}={results['runs'][0]['values'][BITS]}" in results["best"]


def metrics(sweep: Path, number: str) -> dict[str, Any]:
    return json.loads((sweep / "out" / number / "metrics.json").read_text())


@pytest.mark.parametrize("number", NUMBERS)
def test_the_offline_files_hold_each_run(sweep: Path, said: str, number: str) -> None:
    folder = sweep / "out" / number
    config, history = read_run(folder)
    weights, activations = [(w, a) for w in (2, 4) for a in (4, 8)][int(number)]
    assert config["quantize"]["weights"]["bits"] == weights
    assert config["quantize"]["activations"]["bits"] == activations
    logged = {key: value for step in history for key, value in step.items()}
    figures = metrics(sweep, number)
    assert logged["quantized/fidelity"] == pytest.approx(figures["quantized"]["fidelity"])
    assert logged["bytes/packed"] == figures["bytes"]["packed"]
    assert logged["seconds/calibrate"] == figures["seconds"]["calibrate"]
    assert {"layers.path", "overlays.filenames", "clips.videos"} <= logged.keys()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    kept = list(records(file))
    (group,) = {record.run.run_group for record in kept if record.run.run_id}
    assert group == "four"
    (artifact,) = [record.artifact for record in kept if record.artifact.type == "model"]
    assert {entry.path for entry in artifact.manifest.contents} >= {"model.safetensors", "card.md"}
