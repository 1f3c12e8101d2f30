"""A recipe before it is carried out: its resolved keys, the bits of each layer, and a rough estimate of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from qsam2.calibration.forward import run_sample
from qsam2.data.calibration_data import CalibrationData, Sample
from qsam2.data.clips import Source
from qsam2.data.sources import open_stills, open_train, open_val
from qsam2.data.video import Video
from qsam2.evaluation.own_masks import label_sources, label_videos
from qsam2.layers.convert import convert
from qsam2.layers.products import product_table, products
from qsam2.loading import load_float
from qsam2.recipe import Recipe, save_recipe
from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.train.trainer import device_of

STEP_FORWARDS = 3
"""A training step takes about as long as this many forward passes: backward costs two."""
QUANTIZED_FORWARDS = 2
"""A forward pass with fake quantization takes up to this many float ones."""


def plan(recipe: Recipe) -> str:
    """The text of `qsam2 train --dry-run`; nothing is written. UserError where the run would fail at its start."""
    videos, sources, stills = open_val(recipe), open_train(recipe), open_stills(recipe)
    model = load_float(recipe).to(device_of(recipe.trainer))
    label_sources(sources, model, recipe.data.max_objects)
    videos = label_videos(videos, model, recipe.data.max_objects)
    sample = _first_clip(recipe, sources, videos, model.image_size)
    with torch.no_grad():
        image_s = _seconds(lambda: model.forward_image(sample.clip.images[:1].to(model.device)))
        frame_s = _seconds(lambda: run_sample(model, sample, ("mask",))) / len(sample.clip.frame_indices)
    parts = [save_recipe(recipe).rstrip()]
    if recipe.quantize is not None:
        parts.append(product_table(products(convert(model, recipe.quantize), recipe.memory)))
        if recipe.quantize.allocate is not None:
            parts.append("quantize.allocate will give layers other weight bits")
    frames = sum(min(len(video), recipe.evaluate.frames or len(video)) for video in videos)
    seconds = _estimate(recipe, image_s, frame_s, frames, len(stills))
    total = f"about {sum(seconds.values()) / 60:.0f} min: "
    total += ", ".join(f"{stage} {value / 60:.1f} min" for stage, value in seconds.items())
    basis = f"one image ({image_s:.2f} s) and one tracked frame ({frame_s:.2f} s) of the float model on this machine"
    parts.append(f"{total}\nestimated from {basis}; reconstruction is not counted")
    parts.append(f"nothing was written; without --dry-run the run folder is {recipe.run_folder}")
    return "\n\n".join(parts)


def _first_clip(recipe: Recipe, sources: Sequence[Source], videos: Sequence[Video], image_size: int) -> Sample:
    """The first clip of the calibration; one of the scored videos if the recipe does not calibrate."""
    if recipe.quantize is None:
        recipe = recipe.model_copy(update={"calibrate": CalibrateRecipe(stills=0, clips=1)})
        sources = [Source(videos)]
    return next(CalibrationData.of(recipe, sources, image_size).clip_samples(0, 1))


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _estimate(recipe: Recipe, image_s: float, frame_s: float, frames: int, stills: int) -> dict[str, float]:
    """Seconds by stage."""
    amount = recipe.calibrate
    clip_frames = amount.clips * amount.num_frames
    passes = 1 + (amount.weights is not None) + (amount.smooth is not None) + 2 * (amount.rounding is not None)
    seconds = {}
    if recipe.quantize is not None:
        seconds["calibration"] = passes * QUANTIZED_FORWARDS * (amount.stills * image_s + 2 * clip_frames * frame_s)
    slower = QUANTIZED_FORWARDS if recipe.quantize is not None else 1
    for stage in recipe.training:
        assert stage.train is not None
        frames_seen = stage.trainer.max_steps * stage.trainer.accumulate * stage.data.batch_size * stage.data.num_frames
        one = image_s if stage.train.stages[0].kind == "stills" else frame_s
        seconds["training"] = seconds.get("training", 0.0) + frames_seen * STEP_FORWARDS * slower * one
    models = 1 if recipe.quantize is None else 3 if recipe.train and recipe.evaluate.after_calibration else 2
    seconds["scoring"] = models * (frames * frame_s + stills * image_s)
    return seconds
