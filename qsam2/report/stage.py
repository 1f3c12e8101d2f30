"""The last stage of a run: saves what its report shows, logs to Weights & Biases, writes the report."""

from __future__ import annotations

from PIL.Image import Image

from qsam2.calibration.forward import run_sample
from qsam2.data.calibration_data import far_apart
from qsam2.report.layer_statistics import measure_layers
from qsam2.report.memory_use import memory_use
from qsam2.report.overlays import contact_sheet
from qsam2.report.page import write_report
from qsam2.report.read import LAYERS, MEMORY, save_json
from qsam2.report.tracked_clips import save_clips
from qsam2.report.wandb import log_results
from qsam2.run import Run

OVERLAYS = 3
"""Number of videos with a contact sheet in Weights & Biases."""


def report(run: Run) -> None:
    """Stage: measure layers, draw masks, log to Weights & Biases and write `report.html`, which ends a run."""
    if run.silent:
        return
    folder = run.folder.path
    run.prepare_inference()
    if run.teacher is not None:
        sample = far_apart(next(run.calibration.clip_samples(0, 1)))
        measured = measure_layers(
            run.layers, run.model, run.teacher, run.latent, lambda network: run_sample(network, sample, ("mask",))
        )
        save_json(folder, LAYERS, measured)
    tracked = any(len(video) > 1 for video in run.videos)  # False for pictures without masks
    if tracked:
        save_clips(folder, run.videos, run.predictions, run.recipe.evaluate.frames)
        if run.recipe.memory.sharing != "none":
            save_json(folder, MEMORY, memory_use(run.model, run.videos[0], run.recipe.evaluate))
    log_results(run.loggers, run.folder.metrics, draw_overlays(run) if tracked else [])
    write_report(folder)


def draw_overlays(run: Run) -> list[Image]:
    """Contact sheets of the first videos that this process tracked: truth and each model's masks."""
    tracked = {name for name, _ in run.predictions["float"]}
    return [
        contact_sheet(video, run.predictions, length=min(len(video), run.recipe.evaluate.frames or len(video)))
        for video in run.videos[:OVERLAYS]
        if video.name in tracked
    ]
