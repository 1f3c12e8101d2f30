"""The stages of a run that score: the float model, the calibrated model, and what the run ships."""

from __future__ import annotations

import copy
import logging

import torch

from qsam2.data.video import Predictions
from qsam2.evaluation.scoring import compare, headline, score_any, score_float
from qsam2.layers.audit import audit
from qsam2.layers.convert import finalize
from qsam2.models import SAM2
from qsam2.run import Run

log = logging.getLogger("qsam2")


def score_teacher(run: Run) -> None:
    """Stage: score the float model that a quantized one starts from."""
    if run.teacher is not None:
        score(run, run.teacher, "float")


def score_calibrated(run: Run) -> None:
    """Stage: score what calibration alone gives (PTQ), on a finalized copy: the baseline of QAT."""
    if run.teacher is None or not (run.recipe.train is None or run.recipe.evaluate.after_calibration):
        return
    calibrated = copy.deepcopy(run.model)
    finalize(calibrated)
    score(run, calibrated, "ptq", run.predictions["float"])


def score_result(run: Run) -> None:
    """Stage: finalize a quantized model and score what the run ships."""
    if run.teacher is None:
        score(run, run.model, "float")
        return
    finalize(run.model)
    if run.recipe.train is None:  # nothing has changed since it was calibrated
        run.predictions["quantized"] = run.predictions["ptq"]
        run.folder.record("quantized", run.folder.metrics["ptq"])
    else:
        score(run, run.model, "quantized", run.predictions["float"])


def score(run: Run, model: SAM2, name: str, reference: Predictions | None = None) -> None:
    """Score a model into `metrics.json` under `name`; one with a float `reference` is audited and compared with it."""
    recipe, folder = run.recipe, run.folder
    if reference is not None:
        image = torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)
        log.info("%s", audit(model, run.layers, recipe.quantize, lambda: model.forward_image(image)))
    with folder.stage(f"score {name}", f"{len(run.videos)} videos"):
        if reference is None and model.memory_reader is None:  # cached scores are of models that read memory as sam2
            block, predictions = score_float(model, run.videos, recipe.evaluate, recipe.trainer, folder=folder.path)
        else:
            block, predictions = score_any(
                model, run.videos, recipe.evaluate, recipe.trainer, folder=folder.path, reference=reference
            )
    if run.stills:
        with folder.stage(f"score {name} on stills", f"{len(run.stills)} images"):
            score_stills = score_float if reference is None else score_any
            boxes, _ = score_stills(model, run.stills, recipe.evaluate, recipe.trainer, folder=folder.path)
        block |= {"box_mIoU": boxes["box_mIoU"], "stills": boxes}
        log.info("%s: box-prompt mIoU %.1f", name, boxes["box_mIoU"])
    if reference is not None:
        block["versus_float"] = compare(block, folder.metrics["float"])
        if name == "quantized" and "ptq" in folder.metrics:
            block["versus_ptq"] = compare(block, folder.metrics["ptq"])
    folder.record(name, block)
    log.info("%s: %s", name, headline(block))
    run.predictions[name] = predictions
