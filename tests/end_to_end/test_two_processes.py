"""Two processes on the CPU: the scores of one and, at the same global batch, the weights of one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TRAIN, TRAIN_FLOAT, W4A4, finish, read_checkpoint, small, start, state, without_seconds

from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe
from qsam2.recipe.load import merge

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
MANY = 64
"""Elements from which a median is meaningful."""
PICTURES = ("report/clip", "report/worst")
MASKS_ONLY = {"prompts": {"point": 0.0, "box": 0.0}}  # clicks are drawn a rank

Pair = dict[int, Path]
"""Run folders by number of processes."""


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Carries out a recipe in this process with a batch of two, and in two processes with one clip each."""

    def carry_out(**more: Any) -> Pair:
        folder = tmp_path_factory.mktemp("pair")
        runs: Pair = {}
        for devices in (1, 2):
            runs[devices] = folder / str(devices)
            own = {"trainer": {"devices": devices}, "data": {"batch_size": 2 // devices}}
            values = small(checkpoint, runs[devices], **merge(more, own))
            if devices == 1:
                run_recipe(build_recipe(values))
            else:
                finish(start(values, folder))
        return runs

    return carry_out


@pytest.fixture(scope="module")
def quantized(pair: Callable[..., Pair]) -> Pair:
    """One step: after it the last bit of a sum flips roundings, and two W4A4 runs part."""
    data = {"val": "moving_objects:3:val", "max_objects": 3}  # the two clips show one object and three
    return pair(quantize=W4A4, train=merge(TRAIN, MASKS_ONLY), trainer={"max_steps": 1}, data=data)


@pytest.fixture(scope="module")
def fewer_videos(pair: Callable[..., Pair]) -> Pair:
    """A float run of three steps, with one video for two processes."""
    return pair(train=merge(TRAIN_FLOAT, MASKS_ONLY), trainer={"max_steps": 3}, data={"max_objects": 3})


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["quantized", pytest.param("fewer_videos", marks=pytest.mark.prove)])
def test_weights_are_those_of_one_process(name: str, request: pytest.FixtureRequest, checkpoint: Path) -> None:
    runs: Pair = request.getfixturevalue(name)
    one, two = state(runs[1]), state(runs[2])
    before = torch.load(checkpoint, weights_only=True)["model"]
    moved = max(float((one[f"model.{key}"] - value).abs().max()) for key, value in before.items())
    assert moved > 8 * TOLERANCE
    assert one.keys() == two.keys()
    apart, count = 0, 0
    for key, value in one.items():
        if value.is_floating_point():
            differences = (two[key] - value).abs()
            apart, count = apart + int((differences > TOLERANCE).sum()), count + value.numel()
            # AdamW's first step is as large for a gradient that is nearly zero, where the last bit decides: that of a
            # single clip, or of a few weights of many. Without the other rank's gradients a quarter of them would part.
            assert float(differences.max()) <= 2e-3, key
            assert value.numel() < MANY or float(differences.median()) <= TOLERANCE, key
        else:
            assert torch.equal(two[key], value), key
    assert apart <= 1e-3 * count


def test_gradients_are_those_of_one_process(quantized: Pair) -> None:
    # AdamW hides the size of a first gradient: its first moments do not
    one, two = (read_checkpoint(quantized[devices])["optimizer_states"][0]["state"] for devices in (1, 2))
    whole = math.sqrt(sum(float(moments["exp_avg"].square().sum()) for moments in one.values()))
    assert whole > 1e-3
    for index, moments in one.items():
        difference = float((two[index]["exp_avg"] - moments["exp_avg"]).norm())
        assert difference <= 5e-2 * float(moments["exp_avg"].norm()) + 1e-6 * whole, index


def test_scores_are_those_of_one_process(quantized: Pair) -> None:
    one, two = metrics(quantized[1]), metrics(quantized[2])
    for name in ("float", "ptq"):  # the same weights to the last bit: so are the scores, on three videos
        assert without_seconds(two[name]) == without_seconds(one[name])
        assert len(two[name]["per_object"]) == 3
    assert two["quantized"]["J&F"] == pytest.approx(one["quantized"]["J&F"], abs=2.0)
    assert two["bytes"] == one["bytes"]


def test_evaluate_writes_and_prints_once(checkpoint: Path, tmp_path: Path) -> None:
    words = [checkpoint, "model.image_size=64", "--data", "moving_objects:3:val", "--frames", "4"]
    evaluate = [sys.executable, "-m", "qsam2", "evaluate", *map(str, words), "trainer.accelerator=cpu"]
    blocks, printed = [], []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        command = [*evaluate, f"trainer.devices={devices}", "--json", str(out), "--reference", str(checkpoint)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        blocks.append(without_seconds(json.loads(out.read_text())))
        printed.append(done.stdout)
    assert blocks[0] == blocks[1] and printed[0] == printed[1]
    assert len(printed[1].splitlines()) == 2 and sorted(file.name for file in tmp_path.iterdir()) == [
        "1.json",
        "2.json",
    ]
    refused = subprocess.run(
        [*evaluate, "trainer.devices=2", "--save-masks", "masks"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "--save-masks needs one process, trainer.devices=2" in refused.stderr


@pytest.mark.prove
def test_fewer_videos_than_processes(fewer_videos: Pair) -> None:
    one, two = metrics(fewer_videos[1]), metrics(fewer_videos[2])
    assert two["float"].keys() == one["float"].keys()
    assert two["float"]["per_object"].keys() == one["float"]["per_object"].keys()
    assert two["float"]["J&F"] == pytest.approx(one["float"]["J&F"], abs=2.0)


def test_one_process_writes_the_folder(quantized: Pair) -> None:
    files = [sorted(str(file.relative_to(run)) for file in run.rglob("*")) for run in (quantized[1], quantized[2])]
    one, two = ([file for file in each if not file.startswith((*PICTURES, ".lock"))] for each in files)
    assert one == two
    assert any(file.startswith(PICTURES) for file in files[1])  # of the videos that the first rank scored
    assert not [file for file in files[1] if file.endswith(".tmp")]
