"""Run folders as runs leave them, without running one: what pages are made from."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsam2.data.video import Video
from qsam2.evaluation.metrics.interval import paired_difference
from qsam2.recipe import build_recipe, save_recipe
from qsam2.report.overlays import save_clips
from qsam2.report.read import CLIPS, FOLDER, LAYERS, MADE, MEMORY, SavedRun, read_run

W2 = {"quantize": {"weights": {"method": "lsc", "bits": 2}}}
QAT = {**W2, "train": {}, "trainer": {"max_steps": 7}, "memory": {"sharing": "adaptive", "frames": 3}}
SECONDS = {
    "convert": 0.5, "score float": 1.0, "calibrate": 2.0, "score ptq": 1.0, "train": 12.34, "score quantized": 1.0,
}  # fmt: skip
SIZE = (48, 64)


class Squares(Video):
    """Grey frames on which a square moves to the right."""

    size = SIZE

    def __init__(self, name: str = "squares", length: int = 8) -> None:
        self.name = name
        self.frame_names = [str(index) for index in range(length)]

    def frame(self, index: int) -> np.ndarray:
        return np.full((*SIZE, 3), 100, np.uint8)

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        return {1: square(10, 4 + 4 * index)}


def square(top: int, left: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + 16, left : left + 16] = True
    return mask


def block(score: float, shift: float = 0.0) -> dict[str, Any]:
    """A score block of three objects in two videos."""
    scores = {"cat": {"1": score - 4, "2": score + 1 + shift}, "dog": {"1": score + 3 - shift}}
    objects = {
        video: {item: {"J&F": own, "J": own - 1, "F": own + 1} for item, own in items.items()}
        for video, items in scores.items()
    }
    return {"J&F": score, "J": score - 1, "F": score + 1, "seconds_per_frame": 0.1234, "per_object": objects}


def metrics_of(**scores: float) -> dict[str, Any]:
    """Metrics of a run; `float` is among the models."""
    found: dict[str, Any] = {"seconds": dict(SECONDS)}
    for index, (model, score) in enumerate(scores.items()):
        found[model] = block(score, shift=0.5 * index)
        if model != "float":
            found[model]["fidelity"] = 88.84
            found[model]["versus_float"] = paired_difference(found[model]["per_object"], found["float"]["per_object"])
        if model == "quantized":
            found[model]["versus_ptq"] = paired_difference(found[model]["per_object"], found["ptq"]["per_object"])
    found["bytes"] = {"float32": 16_000_000, "bfloat16": 8_000_000, "packed": 2_500_000}
    return found


DATE, MACHINE, CODE = "2026-01-02 03:04 UTC", "a processor, Linux, torch 2", "0.1.0 (abc1234)"
METRICS = metrics_of(float=70.0, ptq=50.0, quantized=65.0)


def layers() -> dict[str, Any]:
    """Result of `measure_layers`."""
    rows = [
        {"name": "stem", "kind": "Conv2d", "weight_bits": 8, "activation_bits": 8, "reason": "reads <all>",
         "weight_snr_db": 40.0, "weight_clipped": 0.0, "scale": 0.1, "input_snr_db": 35.0, "input_clipped": 0.01},
        {"name": "image_encoder.mlp", "kind": "Linear", "weight_bits": 2, "activation_bits": None, "reason": "bits",
         "weight_snr_db": 9.5, "weight_clipped": 0.125, "scale": 0.5},
        {"name": "attention", "kind": "Attention", "weight_bits": None, "activation_bits": 4, "reason": "bits",
         "input_snr_db": 20.0, "input_clipped": 0.0},
        {"name": "head", "kind": "Linear", "weight_bits": None, "activation_bits": None, "reason": "the recipe's rule"},
    ]  # fmt: skip
    bell = np.exp(-(np.linspace(-4, 3, 40) ** 2))
    grid = {"bits": 2, "levels": [-2, 1], "reach": [-4, 3]}
    histogram = {**grid, "before": list(bell / bell.sum()), "after": [0.025] * 40}
    weights, inputs = ([{"layer": layer, **histogram}] for layer in ("image_encoder.mlp", "stem"))
    return {"layers": rows, "weights": weights, "inputs": inputs}


def memory() -> dict[str, Any]:
    """Result of `memory_use`."""
    rows = [{"frame": 1, "read": {}, "key_frames": 1, "of": 1}]
    rows += [
        {"frame": frame, "read": {frame - 1: "own keys", frame - 2: "shared keys", frame - 3: "shared keys"},
         "key_frames": 3, "of": 4}
        for frame in range(4, 8)
    ]  # fmt: skip
    return {"video": "squares", "frames": rows}


def tracked(video: Video, *models: str) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Predictions of a video: the first model is right, each further one a little more to the right."""
    return {
        model: {
            (video.name, 1): np.packbits(
                np.stack([np.roll(video.masks(index)[1], 2 * late, axis=1) for index in range(len(video))])  # type: ignore[index]
            )
        }
        for late, model in enumerate(models)
    }


def save(run: Path, name: str, values: dict[str, Any]) -> None:
    (run / FOLDER).mkdir(exist_ok=True)
    (run / FOLDER / name).write_text(json.dumps(values))


def write_run(path: Path, values: dict[str, Any] = QAT, metrics: dict[str, Any] | None = METRICS) -> Path:
    """A run folder with all that a run keeps; of a recipe that quantizes also its layers."""
    recipe = build_recipe({"name": path.name, "output": str(path), **values})
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(save_recipe(recipe))
    if metrics is not None:
        (path / "metrics.json").write_text(json.dumps(metrics))
    if recipe.train is not None:
        curves = path / "curves" / "version_0"
        curves.mkdir(parents=True, exist_ok=True)
        rows = [f"{step},{9 / step},{0.1 * step},0.2,0.3" for step in range(1, 8)]
        head = "step,loss,scale/mlp.weight_quantizer,scale/mlp.input_quantizer,lr"
        (curves / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    models = ("float",)
    if recipe.quantize is not None:
        models += ("ptq", "quantized")
        save(path, LAYERS, layers())
    if metrics is not None and "bytes" in metrics:
        save(path, MADE, {"date": DATE, "machine": MACHINE, "code": CODE})
    if recipe.memory.sharing != "none":
        save(path, MEMORY, memory())
    video = Squares()
    save(path, CLIPS, save_clips(path / FOLDER, [video], tracked(video, *models), None))
    return path


def kept_run(path: Path, values: dict[str, Any] = QAT, metrics: dict[str, Any] | None = METRICS) -> SavedRun:
    """The run folder of `write_run`, read."""
    return read_run(write_run(path, values, metrics))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make room run out whenever a file is written."""

    def full(file: Path, data: bytes) -> int:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
