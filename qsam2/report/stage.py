"""The last stage of a run: saves what its report shows, logs to Weights & Biases, writes the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
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
from qsam2.output import read_json, write_text
from qsam2.recipe import save_recipe
from qsam2.report.layer_statistics import measure_layers
from qsam2.report.overlays import contact_sheet, save_clips
from qsam2.report.page import REPORT, render
from qsam2.report.read import CLIPS, FOLDER, LAYERS, MEMORY, MODELS, read_run
from qsam2.run import Run

OVERLAYS = 3
"""Number of videos with a contact sheet in Weights & Biases."""
SCORES = ("J&F", "J", "F", "fidelity", "box_mIoU", "seconds_per_frame")
COLUMNS = (
    *("name", "kind", "weight_bits", "activation_bits", "reason"),
    *("scale", "weight_snr_db", "weight_clipped", "input_snr_db", "input_clipped"),
)
"""Columns of the per-layer table: `scale` is a mean, signal to noise is in dB, clipped values are shares."""
FILES = ("model.safetensors", "card.md", "card.json")
"""Files of the artifact, beside the recipe: the packed model and its card."""


def report(run: Run) -> None:
    """Stage: measure layers, draw masks, log to Weights & Biases and write `report.html`, which ends a run."""
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
    log_results(run.loggers, run.folder.metrics, pictures)
    write_text(folder / REPORT, render(read_run(folder)))


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
def log_results(loggers: Sequence[Logger], metrics: dict[str, Any], pictures: Sequence[Image]) -> None:
    """Log final scores, bytes and seconds, the per-layer table, mask overlays, a clip, and the model as an artifact.

    Table, clip and model are read from the run folder, which is the logger's folder.
    """
    logger = next((logger for logger in loggers if isinstance(logger, WandbLogger)), None)
    if logger is None:
        return
    import wandb  # takes a second: only if it is used

    scores = {
        f"{model}/{key}": metrics[model][key] for model in MODELS for key in SCORES if key in metrics.get(model, {})
    }
    amounts = {f"{kind}/{name}": value for kind in ("bytes", "seconds") for name, value in metrics[kind].items()}
    logger.log_metrics({**scores, **amounts})
    folder = Path(str(logger.save_dir))
    if layers := read_json(folder / FOLDER / LAYERS):
        rows = [[row.get(column) for column in COLUMNS] for row in layers["layers"]]
        logger.log_table("layers", columns=list(COLUMNS), data=rows)
    if pictures:
        logger.log_image("overlays", list(pictures))
    if clips := sorted(map(str, (folder / FOLDER).glob("*.mp4"))):
        logger.log_video("clips", clips[:1])
    if "quantized" in metrics:
        artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model")
        for name in FILES:
            artifact.add_file(str(folder / name), policy="immutable")  # no second copy on this disk
        with artifact.new_file("recipe.yaml", mode="w") as file:
            file.write(save_recipe(read_run(folder).recipe))
        logger.experiment.log_artifact(artifact)
    logger.experiment.finish()
