"""One run, from recipe to run folder: the stages in their order, one call each."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image
from tqdm import tqdm

from qsam2.calibration.activation_ranges import calibrate_sam2
from qsam2.calibration.allocation import (
    Allocation,
    allocatable,
    allocate,
    importance,
    importance_costs,
    measured_costs,
)
from qsam2.calibration.data import CalibrationData, encode, far_apart, run_sample
from qsam2.calibration.gptq import round_sam2
from qsam2.calibration.gram import gather_inputs, gram_bytes
from qsam2.calibration.smooth import gather_reader_inputs, norms_and_readers, reader_layers, smooth
from qsam2.calibration.weights import calibrate_weights, choose_layers, input_quantizers
from qsam2.data.clips import ClipDataset, Source
from qsam2.data.datamodule import ClipDataModule
from qsam2.data.sources import open_stills, open_train, open_val
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.evaluate.scoring import compare, score_any, score_float, score_videos
from qsam2.evaluate.tracking import Predictions
from qsam2.export.card import write_card
from qsam2.export.packed import model_bytes, save_packed, save_weights
from qsam2.layers.audit import audit
from qsam2.layers.convert import ConvertedLayer, conversion_table, convert, finalize, quantizers
from qsam2.load import load_float
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.quantizers.kernels import choose_kernels
from qsam2.recipe import Recipe
from qsam2.reconstruction.blocks import Scale
from qsam2.reconstruction.reconstruct import reconstruct
from qsam2.reconstruction.time_scales import HierarchicalData, time_scales
from qsam2.report.measure import latent_weights, measure_layers
from qsam2.report.memory_use import memory_use
from qsam2.report.overlays import contact_sheet
from qsam2.report.page import write_report
from qsam2.report.read import LAYERS, MEMORY, keep
from qsam2.report.tracked_clips import keep_clips
from qsam2.report.wandb import log_results
from qsam2.run_folder import RunFolder, is_first_rank
from qsam2.train.module import VideoTraining
from qsam2.train.trainer import LAST, build_loggers, build_trainer, training_options

OVERLAYS = 3
"""How many videos a run's pictures show."""

log = logging.getLogger("qsam2")


def run(recipe: Recipe) -> dict[str, Any]:
    """Carry out a recipe and return what its `metrics.json` holds. A run that was killed goes on where it was.

    Raises:
        UserError: the recipe, its data or its checkpoint cannot be used; the run folder holds another run.
    """
    folder = RunFolder(recipe)
    if folder.finished:
        log.info("%s is complete: its results are in metrics.json and report.html", folder.path)
        return folder.metrics
    if not is_first_rank():  # one rank tells the story of all
        log.setLevel(logging.WARNING)
    L.seed_everything(recipe.seed, verbose=False)
    videos, sources = open_val(recipe), open_train(recipe)
    if all(len(video) == 1 for video in videos):
        raise UserError(f"data.val={recipe.data.scored}: a run is scored on videos; for stills use qsam2 evaluate")
    open_stills(recipe)  # whatever is wrong with them shows at once
    model = load_float(recipe)
    config = recipe.model_dump(mode="json")
    loggers = build_loggers(recipe.log, folder=folder.path, name=recipe.name, config=config)
    layers: list[ConvertedLayer] = []
    tracked: dict[str, Predictions] = {}

    if recipe.quantize is None:
        use_memory(model, recipe.memory)
        train(model, sources, recipe, folder, loggers)
        tracked["float"] = score(model, "float", videos, recipe, folder)
    else:
        teacher = copy.deepcopy(model)
        recipe = allocate_bits(model, sources, recipe, folder)
        calibrate_layers(model, sources, recipe, folder)
        smooth_norms(model, sources, recipe, folder)
        layers = convert_layers(model, recipe, folder)  # before the scores: a wrong rule shows at once
        tracked["float"] = score(teacher, "float", videos, recipe, folder)
        calibrate(model, sources, recipe, folder)
        latent = latent_weights(model)
        round_weights(model, sources, recipe, folder)
        reconstruct_blocks(model, teacher, sources, recipe, folder)
        use_memory(model, recipe.memory)  # the float model above and the teacher read all of their memory
        if recipe.train is None or recipe.evaluate.after_calibration:
            tracked["ptq"] = score_ptq(model, layers, videos, recipe, folder, tracked["float"])
        train(model, sources, recipe, folder, loggers, teacher)
        if recipe.train is not None:
            latent = latent_weights(model)
        finalize(model)
        if recipe.train is None:  # nothing has changed since
            tracked["quantized"] = tracked["ptq"]
            folder.record("quantized", folder.metrics["ptq"])
        else:
            tracked["quantized"] = score(model, "quantized", videos, recipe, folder, tracked["float"], layers)
        keep_layers(model, teacher, layers, latent, sources, recipe, folder)
    folder.record("bytes", model_bytes(model))
    write_results(model, layers, videos, tracked, recipe, folder, loggers)
    return folder.metrics


def allocate_bits(model: SAM2, sources: list[Source], recipe: Recipe, folder: RunFolder) -> Recipe:
    """Give each layer its bits under the recipe's budget: the recipe with rules that say so."""
    quantize = recipe.quantize
    if quantize is None or quantize.allocate is None:
        return recipe
    budget, layers = quantize.allocate, allocatable(model, quantize)
    by = "importance" if budget.sensitivity is None else "measured sensitivity"
    reason = f"allocated by {by}"
    if (before := folder.metrics.get("allocated_bits")) is not None:  # the run goes on with the bits that it began with
        resolved = Allocation(before["layers"], before["average"]).resolve(quantize, reason)
        return recipe.model_copy(update={"quantize": resolved})
    if not layers:
        raise UserError("quantize.allocate: rules decide on all layers, none is left to give bits to; remove one")
    with folder.stage("allocate bits", f"{budget.average_bits:g} on average, by {by}"):
        if budget.sensitivity is None:
            place(model, recipe, folder)
            data = calibration_data(model, sources, recipe)
            shown = tqdm(data.clip_samples(), "importance", len(data.clips), disable=not is_first_rank())
            found = importance(layers, lambda sample: run_sample(model, sample), shown)
            costs = importance_costs(found, budget.choices)
        else:
            costs = measured_costs(budget.sensitivity, layers, budget.choices)
        allocation = allocate(layers, costs, budget.average_bits)
    counts = Counter(allocation.bits.values())
    told = ", ".join(f"{counts[bits]} at {bits}" for bits in sorted(counts))
    log.info("%.2f bits on average: %s bits", allocation.average_bits, told)
    folder.record("allocated_bits", {"by": by, "average": allocation.average_bits, "layers": allocation.bits})
    return recipe.model_copy(update={"quantize": allocation.resolve(quantize, reason)})


def calibrate_layers(model: SAM2, sources: list[Source], recipe: Recipe, folder: RunFolder) -> None:
    """Give linear layers, in place, the weights that quantize best on the calibration data."""
    method = recipe.calibrate.weights
    if method is None:
        return
    assert recipe.quantize is not None
    layers = choose_layers(model, recipe.quantize, method.layers)
    run = encode if all(name.startswith("image_encoder.") for name in layers) else run_sample
    data, silent = calibration_data(model, sources, recipe), not is_first_rank()
    what = f"{method.method}, {len(layers)} layers, {gram_bytes(layers.values()) / 1e9:.2f} GB of Gram matrices"
    with folder.stage("calibrate weights", what):
        place(model, recipe, folder)
        shown = tqdm(data.samples(), "gather inputs", len(data), disable=silent)
        samples = ((sample.label, sample) for sample in shown)
        quantized = input_quantizers(layers, recipe.quantize)
        inputs = gather_inputs(layers, lambda sample: run(model, sample), samples, len(data), quantized)
        rows = calibrate_weights(layers, inputs, recipe.quantize, method)
        calibrated = list(tqdm(rows, "calibrate weights", len(layers), disable=silent))
    changed = sum(row.strength > 0 for row in calibrated)
    log.info("%s: %d of %d layers have new weights", method.method, changed, len(calibrated))
    table = {row.name: row.figures() for row in calibrated}
    folder.record("calibrated_weights", {"method": method.method, "layers": table})


def smooth_norms(model: SAM2, sources: list[Source], recipe: Recipe, folder: RunFolder) -> None:
    """Move scales from LayerNorms into the layers that read them, in place: the same function, easier to quantize."""
    alphas = recipe.calibrate.smooth
    if alphas is None:
        return
    assert recipe.quantize is not None
    norms, data = norms_and_readers(model, recipe.quantize), calibration_data(model, sources, recipe)
    with folder.stage("smooth", f"SmoothQuant, {len(norms)} norms"):
        place(model, recipe, folder)
        readers = reader_layers(model, (name for names in norms.values() for name in names))
        shown = tqdm(data.samples(), "gather inputs", len(data), disable=not is_first_rank())
        inputs = gather_reader_inputs(readers, lambda sample: run_sample(model, sample), shown, len(data))
        rows = list(smooth(model, norms, inputs, recipe.quantize, alphas))
    log.info("SmoothQuant: %d of %d norms are smoothed", sum(row.alpha is not None for row in rows), len(rows))
    folder.record("smoothed", {row.name: row.figures() for row in rows})


def convert_layers(model: SAM2, recipe: Recipe, folder: RunFolder) -> list[ConvertedLayer]:
    """Replace the model's layers by quantized ones, by the recipe's rules."""
    assert recipe.quantize is not None
    with folder.stage("convert"):
        layers = convert(model, recipe.quantize)
        log.info("\n%s", conversion_table(layers))
    return layers


def calibrate(model: SAM2, sources: list[Source], recipe: Recipe, folder: RunFolder) -> None:
    """Find the ranges of all quantizers."""
    amount, data = recipe.calibrate, calibration_data(model, sources, recipe)
    if recipe.reconstruct is not None and recipe.reconstruct.video is not None:
        data = HierarchicalData(model, data)
    what = f"{amount.stills} stills, {amount.clips} clips of {amount.num_frames} frames"
    with folder.stage("calibrate", what):
        place(model, recipe, folder)
        calibrate_sam2(model, data, progress=is_first_rank())


def round_weights(model: SAM2, sources: list[Source], recipe: Recipe, folder: RunFolder) -> None:
    """Give quantized weights, in place and for good, the integers of least output error."""
    method = recipe.calibrate.rounding
    if method is None:
        return
    with folder.stage("round weights", method.method):
        data = calibration_data(model, sources, recipe)
        rows = round_sam2(model, data, method.damping, progress=is_first_rank())
    better = sum(row.error[1] < row.error[0] for row in rows)
    log.info("%s: %d of %d layers have other integers than the nearest", method.method, better, len(rows))
    folder.record("rounded", {"method": method.method, "layers": {row.name: row.figures() for row in rows}})


def reconstruct_blocks(model: SAM2, teacher: SAM2, sources: list[Source], recipe: Recipe, folder: RunFolder) -> None:
    """Fit the rounding of weights and the steps of activations, block by block, to the float model."""
    method = recipe.reconstruct
    if method is None:
        return
    data = calibration_data(model, sources, recipe)
    scales: dict[Scale, CalibrationData] = {"frame": data, "short": data, "long": data}
    if method.video is not None:
        size = {"image_size": model.image_size, "max_objects": recipe.data.max_objects}
        scales = time_scales(sources, data, recipe.calibrate, **size, seed=recipe.seed)
    with folder.stage("reconstruct", f"{method.method}, {method.iterations} iterations a block"):
        for network in (model, teacher):
            place(network, recipe, folder)
        done = reconstruct(
            model,
            teacher,
            scales,
            method,
            recipe.trainer,
            folder=folder.path,
            seed=recipe.seed,
            silent=not is_first_rank(),
        )
    log.log(logging.INFO if done.complete else logging.WARNING, "%s", done.summary)
    folder.record("reconstruction", done.figures())


def place(model: SAM2, recipe: Recipe, folder: RunFolder) -> None:
    """Put a model where the Trainer would, in eval mode."""
    model.to(build_trainer(recipe.trainer, folder=folder.path).strategy.root_device).eval()


def calibration_data(model: SAM2, sources: list[Source], recipe: Recipe) -> CalibrationData:
    """The stills and clips that the recipe calibrates on."""
    return CalibrationData(
        sources,
        recipe.calibrate,
        image_size=model.image_size,
        max_objects=recipe.data.max_objects,
        max_stride=recipe.data.max_stride,
        seed=recipe.seed,
    )


def train(
    model: SAM2,
    sources: list[Source],
    recipe: Recipe,
    folder: RunFolder,
    loggers: Sequence[Logger],
    teacher: SAM2 | None = None,
) -> None:
    """Train on clips of the train sources, from the last checkpoint if there is one."""
    if recipe.train is None:
        return
    learned = dict(quantizers(model))
    trainer_recipe, data = recipe.trainer, recipe.data
    module = VideoTraining(
        model,
        recipe.train,
        seed=recipe.seed,
        max_steps=trainer_recipe.max_steps,
        teacher=teacher if recipe.train.distill.needs_teacher else None,
        quantizer_parameters=[f"{name}.{key}" for name, q in learned.items() for key, _ in q.named_parameters()],
    )
    last = folder.checkpoints / LAST
    with folder.stage("train", f"{trainer_recipe.max_steps} steps"):
        trainer = build_trainer(
            trainer_recipe, folder=folder.path, loggers=loggers, **training_options(recipe, learned)
        )
        if learned:
            choose_kernels(trainer_recipe.compile, trainer_recipe.max_steps, trainer.strategy.root_device)
        batches = trainer_recipe.max_steps * trainer_recipe.accumulate
        clips = ClipDataset(
            sources,
            num_frames=data.num_frames,
            max_objects=data.max_objects,
            image_size=model.image_size,
            length=batches * data.batch_size * trainer.world_size,
            augment=data.augment is not False,
            seed=recipe.seed,
            max_stride=data.max_stride,
            reverse=data.reverse,
        )
        stream = ClipDataModule(clips, batch_size=data.batch_size, num_workers=data.num_workers)
        trainer.fit(module, stream, ckpt_path=str(last) if last.is_file() else None)
        trainer.save_checkpoint(last)  # a run that is killed while it is scored need not train again
    model.eval()


def score(
    model: SAM2,
    name: str,
    videos: list[Video],
    recipe: Recipe,
    folder: RunFolder,
    reference: Predictions | None = None,
    layers: list[ConvertedLayer] | None = None,
) -> Predictions:
    """Score a model into `metrics.json`; a quantized one (`layers`) is audited first and compared with float."""
    if layers is not None:
        image = torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)
        report = audit(model, layers, recipe.quantize, lambda: model.forward_image(image))
        log.info("%s", report.summary)
    given = (model, videos, recipe.evaluate, recipe.trainer)
    with folder.stage(f"score {name}", f"{len(videos)} videos"):
        if reference is None and model.memory_reader is None:  # scores that are kept know of no other memory
            block, predictions = score_float(*given, folder=folder.path)
        else:
            block, predictions = score_videos(*given, folder=folder.path, reference=reference)
    if stills := open_stills(recipe):
        with folder.stage(f"score {name} on stills", f"{len(stills)} images"):
            scored = score_float if reference is None else score_any
            boxes, _ = scored(model, stills, recipe.evaluate, recipe.trainer, folder=folder.path)
        block |= {"box_mIoU": boxes["box_mIoU"], "stills": boxes}
        log.info("%s: box-prompt mIoU %.1f", name, boxes["box_mIoU"])
    if reference is not None:
        block["versus_float"] = compare(block, folder.metrics["float"])
        if name == "quantized" and "ptq" in folder.metrics:
            block["versus_ptq"] = compare(block, folder.metrics["ptq"])
    folder.record(name, block)
    log.info("%s: J&F %.1f (J %.1f, F %.1f)", name, block["J&F"], block["J"], block["F"])
    return predictions


def score_ptq(
    model: SAM2,
    layers: list[ConvertedLayer],
    videos: list[Video],
    recipe: Recipe,
    folder: RunFolder,
    reference: Predictions,
) -> Predictions:
    """Score what calibration alone gives, on a finalized copy: the baseline of QAT."""
    ptq = copy.deepcopy(model)
    finalize(ptq)
    return score(ptq, "ptq", videos, recipe, folder, reference, layers)


@rank_zero_only
def keep_layers(
    model: SAM2,
    teacher: SAM2,
    layers: list[ConvertedLayer],
    latent: dict[str, torch.Tensor],
    sources: list[Source],
    recipe: Recipe,
    folder: RunFolder,
) -> None:
    """Measure, for the report, what quantization does to weights and to what passes the layers on one clip."""
    sample = far_apart(next(calibration_data(model, sources, recipe).clip_samples(0, 1)))
    for network in (model, teacher):
        place(network, recipe, folder)
    measured = measure_layers(layers, model, teacher, latent, lambda network: run_sample(network, sample, ("mask",)))
    keep(folder.path, LAYERS, measured)


@rank_zero_only
def write_results(
    model: SAM2,
    layers: list[ConvertedLayer],
    videos: list[Video],
    tracked: dict[str, Predictions],
    recipe: Recipe,
    folder: RunFolder,
    loggers: Sequence[Logger],
) -> None:
    """Write the model, its card if it is quantized, and what shows the run: to wandb and as the report."""
    values = recipe.model_dump(mode="json")
    if recipe.quantize is None:
        save_weights(folder.model, model, values)
    else:
        save_packed(folder.model, model, values)
        write_card(folder, recipe, layers)
    pictures = draw_overlays(videos, tracked, recipe)
    keep_clips(folder.path, videos, tracked, recipe.evaluate.frames)
    if recipe.memory.sharing != "none":
        place(model, recipe, folder)
        keep(folder.path, MEMORY, memory_use(model, videos[0], recipe.evaluate))
    log_results(loggers, folder.metrics, pictures)
    write_report(folder.path)


def draw_overlays(videos: list[Video], tracked: dict[str, Predictions], recipe: Recipe) -> list[Image]:
    """Contact sheets of the first videos: truth and each model's masks."""
    shown = [video for video in videos[:OVERLAYS] if any(name == video.name for name, _ in tracked["float"])]
    return [
        contact_sheet(video, tracked, length=min(len(video), recipe.evaluate.frames or len(video))) for video in shown
    ]
