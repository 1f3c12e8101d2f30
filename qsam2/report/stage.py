"""The last stage of a run: saves what its report shows, writes the report, logs to Weights & Biases."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image

from qsam2.calibration.forward import run_sample
from qsam2.data.calibration_data import far_apart
from qsam2.data.video import Video
from qsam2.evaluation.tracking import first_masks, track
from qsam2.memory.bank import Bank
from qsam2.memory.reader import MemoryReader
from qsam2.memory.sharing import KeySet
from qsam2.models import SAM2
from qsam2.output import code_version, cpu_name, read_json, write_text
from qsam2.recipe import Recipe, save_recipe
from qsam2.report.draw import moved_most
from qsam2.report.layer_statistics import measure_layers
from qsam2.report.overlays import contact_sheet, save_clips
from qsam2.report.page import REPORT, render
from qsam2.report.read import CLIPS, FOLDER, LAYERS, MADE, MEMORY, MODELS, read_curves, read_run
from qsam2.run import Run, flat
from qsam2.train.loggers import CURVES, Wandb

OVERLAYS = 3
"""Number of videos with a contact sheet in Weights & Biases."""
SCORES = ("J&F", "J", "F", "fidelity", "box_mIoU")
VERSUS = ("versus_float", "versus_ptq", "scored")
COLUMNS = (
    *("name", "kind", "weight_bits", "activation_bits", "reason"),
    *("scale", "weight_snr_db", "weight_clipped", "input_snr_db", "input_clipped"),
)
"""Columns of the per-layer table: `scale` is a mean, signal to noise is in dB, clipped values are shares."""
FILES = ("model.safetensors", "card.md", "card.json", REPORT)
"""Files of the artifact, beside the recipe: the packed model, its card, the report."""


def report(run: Run) -> None:
    """Stage: measure layers, draw masks, write `report.html`, which ends a run, then log to Weights & Biases."""
    if run.silent:
        return
    folder = run.folder.path

    def save(name: str, values: object) -> None:
        write_text(folder / FOLDER / name, json.dumps(values))

    run.prepare_inference()
    if run.teacher is not None:
        sample = far_apart(next(run.calibration.clip_samples(0, 1)))
        forward = partial(run_sample, sample=sample, prompts=("mask",))
        save(LAYERS, measure_layers(run.layers, run.model, run.teacher, run.latent, forward))
    pictures: list[Image] = []
    if any(len(video) > 1 for video in run.videos):  # pictures without masks are not tracked
        frames = run.recipe.evaluate.frames
        save(CLIPS, save_clips(folder / FOLDER, run.videos, run.predictions, frames))
        if run.recipe.memory.sharing != "none":
            save(MEMORY, memory_use(run.model, run.videos[0], frames))
        here = {name for name, _ in run.predictions["float"]}  # videos that this process tracked
        pictures = [contact_sheet(v, run.predictions, frames=frames) for v in run.videos[:OVERLAYS] if v.name in here]
    save(MADE, {"date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "machine": machine(run.device),
                "code": code_version()})  # fmt: skip
    write_text(folder / REPORT, render(read_run(folder)))
    run.folder.forget_stages()
    log_results(run.loggers, run.recipe, run.folder.metrics, pictures)


def machine(device: torch.device) -> str:
    """The processor or GPU that a run used, the operating system, and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{name}, {platform.system()}, torch {torch.__version__}"


def memory_use(model: SAM2, video: Video, frames: int | None) -> dict[str, Any]:
    """Track a video's first `frames` and record what its first object reads of the memory bank.

    {"video", "frames": [{"frame", "read": {remembered frame: one of `READINGS`}, "key_frames": number of keys read, in
    frames, "of": number of keys in the bank, in frames}]}. Prompted frames count in the last two only.
    """
    length = min(len(video), frames or len(video))
    start, masks = next(iter(first_masks(video, length).items()))
    first = {start: dict(list(masks.items())[:1])}
    rows: list[dict[str, Any]] = []
    reader = model.memory_reader
    assert isinstance(reader, MemoryReader)
    reader.watch = lambda frame, bank, sets: rows.append(_row(frame, bank, sets))
    try:
        track(model, video, first, length=length, non_overlapping=False)
    finally:
        reader.watch = None
    return {"video": video.name, "frames": rows}


def _row(frame: int, bank: Bank, sets: list[KeySet]) -> dict[str, Any]:
    prompted = {memory.time for memory in bank.conditioning}
    read: dict[int, str] = {}
    key_frames = 0.0
    for keys in sets:
        if keys.counts[0] == 0:  # another object's
            continue
        part = (keys.share or 1.0) / (keys.window[0] * keys.window[1])
        key_frames += part
        of_object = [memory.time for index, memory in enumerate(keys.frames)
                     if keys.weights is None or float(keys.weights[index, 0])]  # fmt: skip
        reading = "shared keys" if len(of_object) > 1 else "part of its keys" if part < 1 else "own keys"
        read |= {time: reading for time in of_object if time not in prompted}
    unread = {memory.time: "not read" for memory in bank.recent if memory.time not in read}
    total = len(bank.conditioning) + len(bank.recent)
    return {"frame": frame, "read": read | unread, "key_frames": key_frames, "of": total}


@rank_zero_only
def log_results(loggers: Sequence[Logger], recipe: Recipe, metrics: dict[str, Any], pictures: Sequence[Image]) -> None:
    """Log what a finished run found, see `_log`; an error is a warning."""
    if (logger := next((logger for logger in loggers if isinstance(logger, Wandb)), None)) is not None:
        logger.attempt(lambda: _log(logger, recipe, metrics, pictures))


def _log(logger: Wandb, recipe: Recipe, metrics: dict[str, Any], pictures: Sequence[Image]) -> None:
    """Log scores and differences with their intervals, bytes, seconds, the per-layer table, the step sizes that moved
    most, mask overlays, a clip, and the model with card, recipe and report as an artifact.

    All but the pictures are read from the run folder, which is the logger's folder.
    """
    import wandb  # takes a second: only if it is used

    figures = final_figures(metrics)
    logger.log_metrics(figures)
    folder = Path(str(logger.save_dir))
    if layers := read_json(folder / FOLDER / LAYERS):
        rows = [[row.get(column) for column in COLUMNS] for row in layers["layers"]]
        logger.log_table("layers", columns=list(COLUMNS), data=rows)
    if moved := moved_most(read_curves(folder / CURVES)):
        steps, ratios = zip(*(zip(*curve, strict=True) for curve in moved.values()), strict=True)
        title = "step sizes that moved most, as multiples of their first"
        logger.experiment.log({"moved": wandb.plot.line_series(steps, ratios, list(moved), title, "step")})
    if pictures:
        logger.log_image("overlays", list(pictures))
    if clips := sorted(map(str, (folder / FOLDER).glob("*.mp4"))):
        logger.log_video("clips", clips[:1])
    if recipe.quantize is not None:
        artifact = wandb.Artifact(model_name(recipe, metrics), type="model", metadata={"run": recipe.name, **figures})
        shown = folder / "wandb" / "recipe.yaml"
        write_text(shown, save_recipe(read_run(folder).recipe))
        for file in (shown, *(folder / name for name in FILES)):
            artifact.add_file(str(file), policy="immutable")  # no second copy on this disk
        logger.experiment.log_artifact(artifact)
    logger.experiment.finish()


def final_figures(metrics: dict[str, Any]) -> dict[str, float]:
    """{"MODEL/SCORE", "MODEL/versus_OTHER/difference" with its ends "low" and "high", "bytes/FORMAT", "seconds/STAGE"}.

    A comparison of stills is one of "point_IoU" and one of "box_IoU", whose names come in between.
    """
    blocks = {name: metrics[name] for name in MODELS if name in metrics}
    figures = {f"{name}/{key}": block[key] for name, block in blocks.items() for key in SCORES if key in block}
    for name, block in blocks.items():
        versus = flat({key: block[key] for key in VERSUS if key in block})
        numbers = {key: value for key, value in versus.items() if isinstance(value, (int, float))}
        figures |= {f"{name}/{key.replace('.', '/')}": value for key, value in numbers.items()}
    amounts = {kind: metrics.get(kind, {}) for kind in ("bytes", "seconds")}
    return figures | {f"{kind}/{name}": value for kind, values in amounts.items() for name, value in values.items()}


def model_name(recipe: Recipe, metrics: dict[str, Any]) -> str:
    """Name of a quantized model: its size and bits, as "nano-w4a8"; allocated bits by their average, as "nano-w3.5"."""
    assert recipe.quantize is not None
    weights, activations = recipe.quantize.weights, recipe.quantize.activations
    average = metrics.get("allocated_bits", {}).get("average", weights and weights.bits)
    bits = [*([f"w{average:.3g}"] if weights else []), *([f"a{activations.bits}"] if activations else [])]
    return f"{recipe.model.size}-{''.join(bits) or 'float'}"
