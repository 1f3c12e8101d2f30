"""Recipes that run in seconds, and the ways to carry them out."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml
from shared import once
from small_models import seeing, write_stills
from torch import Tensor
from waiting import HANG_S

import qsam2
from qsam2.pipeline import run_recipe
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.load import merge

ROOT = Path(qsam2.__file__).parents[1]

W4A4 = {
    # minmax: the search for the least error would take most of the time
    "weights": {"method": "lsc", "bits": 4, "range": "minmax"},
    "activations": {"method": "lsc", "bits": 4, "range": "minmax"},
}
TRAIN_FLOAT = {
    "lr": 1.0e-4,
    "image_encoder_lr": 1.0e-4,
    "prompts": {"conditioning_frames": 1, "correction_frames": 1, "correction_clicks": 1},
}
TRAIN = {**TRAIN_FLOAT, "distill": {"mask_logits": 1.0, "image_embeddings": 1.0}}
FLOAT = {
    "model": {"image_size": 64},
    "data": {
        "train": "moving_objects:8:train",
        "val": "moving_objects:1:val",
        "num_frames": 2,
        "max_objects": 1,
        "num_workers": 0,
    },
    "calibrate": {"stills": 2, "clips": 1, "num_frames": 2},
    "trainer": {"max_steps": 2, "log_every": 1, "accelerator": "cpu", "devices": 1},
    "evaluate": {"frames": 4},
    "log": {"wandb": "off"},
}

CLICKS = {"prompts": {"point": 0.6, "box": 0.4}, "freeze_statistics_at": 0.6}
"""Prompts that are drawn at random."""
RUNS: dict[str, dict[str, Any]] = {
    "qat": {
        "quantize": W4A4,
        "train": merge(TRAIN, CLICKS),
        "trainer": {"max_steps": 4, "checkpoint_every": 1},
        "log": {
            "wandb": "offline",
            "group": "tests",
            "job_type": "qat",
            "tags": ["small", "generated"],
            "notes": "a note",
        },
    },
    "ptq": {"quantize": W4A4},
    "float": {
        "train": {**merge(TRAIN_FLOAT, CLICKS), "ema": 0.5},
        "trainer": {"max_steps": 4, "checkpoint_every": 2},
    },
    "reconstructed": {
        "model": {"checkpoint": "auto"},  # the nano that ships
        "quantize": {
            "weights": {"method": "minmax", "bits": 3, "range": "minmax"},
            "activations": {"method": "minmax", "bits": 4, "range": "minmax"},
        },
        "reconstruct": {
            "method": "qdrop",
            "iterations": 4,
            "blocks": ["image_encoder.trunk.blocks.0", "memory_encoder", "memory_attention.layers.0", "obj_ptr_proj"],
        },
        "evaluate": {"protocol": "sav"},
    },
}
"""Differences between the recipes of the session's finished runs (fixture `runs`)."""


def small(checkpoint: Path, output: Path, **more: Any) -> dict[str, Any]:
    """A float recipe's values for a model of 64 px, with `more` laid over them."""
    own = {"output": str(output), "model": {"checkpoint": str(checkpoint)}}
    return copy.deepcopy(merge(merge(FLOAT, own), more))


def write_checkpoint(factory: pytest.TempPathFactory) -> Path:
    """Nano for 64 px with random weights, in Meta's checkpoint format; one file in a session."""
    weights = {"model": seeing().state_dict()}
    return once(factory, "checkpoint", lambda folder: torch.save(weights, folder / "nano.pt")) / "nano.pt"


def recipe_of_run(name: str, checkpoint: Path, folder: Path) -> Recipe:
    """The recipe of a finished run; the reconstructed one also scores stills."""
    stills = [f"evaluate.stills=instance_png:{folder.parent / 'stills'}"] if name == "reconstructed" else []
    return build_recipe(small(checkpoint, folder, **RUNS[name]), stills)


class FinishedRuns(dict[str, Path]):
    """{name of `RUNS`: folder of the finished run}: carried out when it is first asked for, once in a session.

    Beside the folder NAME is NAME.log, what was logged.
    """

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory

    def __missing__(self, name: str) -> Path:
        self[name] = once(self.factory, f"finished/{name}", lambda folder: self._carry_out(name, folder))
        return self[name]

    def _carry_out(self, name: str, folder: Path) -> None:
        if name == "reconstructed":
            write_stills(folder.parent / "stills")
        log, handler = logging.getLogger("qsam2"), logging.FileHandler(folder.with_suffix(".log"))
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_SILENT", "true")
            run_recipe(recipe_of_run(name, write_checkpoint(self.factory), folder))
        log.removeHandler(handler)
        log.setLevel(level)


def start(values: dict[str, Any], folder: Path, log: IO[bytes] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """`python train.py RECIPE` in a process group of its own, on one thread a process; `log`: what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "given.yaml"
    recipe.write_text(yaml.safe_dump(values))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(recipe)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run of `start`; its standard output."""
    try:
        out, err = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, err[-3000:]
    return out


def read_checkpoint(output: Path) -> dict[str, Any]:
    """The last checkpoint of a run folder."""
    return torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)


def state(output: Path) -> dict[str, Tensor]:
    """The trained model of a run folder: weights, learned clips, statistics."""
    return read_checkpoint(output)["state_dict"]


def without_seconds(values: Any) -> Any:
    """Metrics but for what the clock says."""
    if isinstance(values, list):
        return [without_seconds(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {k: without_seconds(v) for k, v in values.items() if k not in ("seconds", "seconds_per_frame")}
