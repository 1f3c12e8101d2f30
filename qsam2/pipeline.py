"""One run, from recipe to run folder: the stages in their order, one call each."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lightning as L

from qsam2.calibration.activation_ranges import calibrate_ranges
from qsam2.calibration.allocation import allocate_bits
from qsam2.calibration.gptq import round_weights
from qsam2.calibration.smooth import smooth_norms
from qsam2.calibration.weights import calibrate_weights
from qsam2.data.clips import Source
from qsam2.data.sources import open_stills, open_train, open_val
from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.evaluation.own_masks import label_footage
from qsam2.evaluation.scoring import ScoreOnTheWay, score_calibrated, score_result, score_teacher
from qsam2.formats.card import export_model
from qsam2.layers.convert import convert_layers
from qsam2.loading import load_float, verify_export
from qsam2.memory.reader import use_memory
from qsam2.models.checkpoints import find_weights
from qsam2.recipe import Recipe
from qsam2.reconstruction.block_by_block import reconstruct_blocks
from qsam2.report.stage import report
from qsam2.run import Run, RunFolder, alone_in, is_first_rank
from qsam2.stored_model import StoredModel
from qsam2.train.loggers import build_loggers
from qsam2.train.trainer import device_of
from qsam2.train.video_training import train, without_noise

log = logging.getLogger("qsam2")


def carry_out(recipe: Recipe) -> dict[str, Any]:
    """`run_recipe`, alone in the run folder. A new folder is made only once data and weights have been found."""
    if not recipe.run_folder.exists():
        open_data(recipe)
        if recipe.model.checkpoint is not None:
            find_weights(recipe.model.size, recipe.model.version, recipe.model.checkpoint)
    with alone_in(recipe.run_folder):
        return run_recipe(recipe)


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Carry out a recipe and return the content of its `metrics.json`. An interrupted run is resumed.

    Raises:
        UserError: the recipe, its data or its checkpoint cannot be used; the run folder holds another run.
    """
    folder = RunFolder(recipe)
    if folder.finished:
        log.info("%s is complete: its results are in metrics.json and report.html", folder.path)
        return folder.metrics
    run = begin(recipe, folder)
    label_footage(run)
    stored = StoredModel(run)  # a resumed run goes on behind the last stage that it holds
    allocate_bits(run)
    stored.carry_out(calibrate_weights)
    stored.carry_out(smooth_norms)
    convert_layers(run)  # before scoring, so that a rule without a match is reported at once
    score_teacher(run)
    stored.carry_out(calibrate_ranges)
    stored.carry_out(round_weights)
    stored.carry_out(reconstruct_blocks)
    use_memory(run.model, recipe.memory)  # the teacher's memory stays unchanged
    score_calibrated(run)
    train(run, [ScoreOnTheWay(run)] if recipe.evaluate.every else [])
    score_result(run)
    export_model(run)
    verify_export(run)
    report(run)
    return folder.metrics


def open_data(recipe: Recipe) -> tuple[list[Video], list[Video], list[Source]]:
    """The videos and stills that a recipe scores on, and the sources that it calibrates and trains on."""
    videos, stills, sources = open_val(recipe), open_stills(recipe), open_train(recipe)
    if has_masks(videos) and all(len(video) == 1 for video in videos):
        raise UserError(f"data.val={recipe.data.scored}: a run is scored on videos; for stills use qsam2 evaluate")
    return videos, stills, sources


def begin(recipe: Recipe, folder: RunFolder) -> Run:
    """Open the data of a run and build its float model and, if it quantizes, the teacher.

    Raises:
        UserError: the data or the checkpoint cannot be used.
    """
    if not is_first_rank():  # one rank logs for all
        log.setLevel(logging.WARNING)
    L.seed_everything(recipe.seed, verbose=False)
    videos, stills, sources = open_data(recipe)
    model = load_float(recipe)
    return Run(
        recipe=recipe,
        folder=folder,
        device=device_of(recipe.trainer),
        loggers=build_loggers(recipe),
        videos=videos,
        stills=stills,
        sources=sources,
        model=model,
        teacher=without_noise(copy.deepcopy(model)) if recipe.quantize is not None else None,
    )
