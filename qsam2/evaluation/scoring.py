"""Scores of a model on videos and stills, compared with those of another: by a command, and as stages of a run.

Scores and masks of float models are kept on disk: runs that start from the same weights need not score them again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from sam2.modeling.sam2_utils import DropPath
from torch import nn

from qsam2.data.sources import open_val
from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.evaluation.images import ITEM_KEYS, score_stills
from qsam2.evaluation.mask_files import check_masks_folder, write_masks
from qsam2.evaluation.metrics.interval import interval_note, interval_text, paired_difference
from qsam2.evaluation.metrics.scores import amount_text
from qsam2.evaluation.own_masks import label_videos
from qsam2.evaluation.stored_masks import store_masks, stored_masks
from qsam2.evaluation.tracking import say_left_out, score_videos
from qsam2.fast.model import FAST_MEMORY, FastSAM2, make_fast
from qsam2.layers.audit import audit
from qsam2.layers.convert import finalize, quantizers
from qsam2.layers.products import track_noise
from qsam2.loading import load_model
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.output import code_digest
from qsam2.recipe import Recipe
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.run import Run
from qsam2.train.trainer import build_trainer, device_of

log = logging.getLogger("qsam2")

Scored = tuple[dict[str, Any], Predictions]
"""A score block and the masks behind it."""

ON_THE_WAY = "score"
"""Prefix of the names of curves that `ScoreOnTheWay` logs."""
UNSCORED = ("training", "dropout_p", "size", "tracked_frame")
"""Values of modules that no score depends on: of training alone, a name, and what was tracked last."""


def score_any(
    model: SAM2,
    videos: Sequence[Video],
    evaluation: EvaluateRecipe,
    trainer: TrainerRecipe,
    *,
    reference: Predictions | None = None,
    silent: bool = False,
) -> Scored:
    """`score_videos`, or `score_stills` where all have one frame."""
    if any(len(video) > 1 for video in videos):
        return score_videos(model, videos, evaluation, trainer, reference=reference, silent=silent)
    return score_stills(model.to(device_of(trainer)), videos, reference=reference)


def score_float(model: SAM2, videos: Sequence[Video], evaluation: EvaluateRecipe, trainer: TrainerRecipe) -> Scored:
    """Score the float model that others are compared with, or take its scores from `evaluation.float_cache`.

    Raises:
        UserError: a file of the cache is damaged.
    """
    if evaluation.float_cache is None or next(quantizers(model), None) is not None or not _alone(trainer):
        return score_any(model, videos, evaluation, trainer)
    file = evaluation.float_cache / f"{_cache_key(model, videos, evaluation, trainer)}.npz"
    if (stored := stored_masks(file)) is not None:
        block, masks = stored
        assert block is not None
        say_left_out(block)
    else:
        block, masks = score_any(model, videos, evaluation, trainer)
        store_masks(file, masks, block)
    return block, masks


def _alone(trainer: TrainerRecipe) -> bool:
    """True in a run of one process; of several each has masks of its own videos only."""
    return build_trainer(trainer, folder=Path(".")).world_size == 1


def _cache_key(model: SAM2, videos: Sequence[Video], evaluation: EvaluateRecipe, trainer: TrainerRecipe) -> str:
    """Hash of all that scores depend on: code, weights, configuration, settings, device, and the pixels scored."""
    settings = evaluation.model_dump_json(exclude={"float_cache"})
    memory = model.memory_reader.recipe.model_dump_json() if model.memory_reader else ""
    causes = [code_digest(), weights_digest(model), _configuration(model), settings, memory, device_of(trainer).type]
    digest = hashlib.sha256(json.dumps(causes).encode())
    for video in videos:
        digest.update(json.dumps([video.name, len(video), video.size, video.frame_names]).encode())
        for index in range(min(len(video), evaluation.frames or len(video))):
            digest.update(video.frame(index).tobytes())
            masks = video.masks(index)
            digest.update(f" {'not annotated' if masks is None else sorted(masks)} ".encode())
            for item in sorted(masks or {}):
                digest.update(np.packbits(masks[item]).tobytes())  # type: ignore[index]
    return digest.hexdigest()[:32]


def _configuration(model: SAM2) -> list[tuple[str, str]]:
    """Class and plain values of all modules, such as the number of remembered frames, without `UNSCORED` ones."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Identity, nn.Dropout, DropPath)):  # all the same where nothing is trained
            continue
        values = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k not in UNSCORED}
        found.append((name, f"{type(module).__qualname__} {sorted(values.items())}"))
    return found


def weights_digest(model: SAM2) -> str:
    """SHA-256 of a model's weights, buffers and image size."""
    digest = hashlib.sha256(str(model.image_size).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def compare(block: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Difference between two score blocks on the same objects, see `paired_difference`.

    In J&F; of blocks without true masks in fidelity; of stills in {"point_IoU", "box_IoU"}.
    """
    pair = block["per_object"], reference["per_object"]
    unit = "images" if "images" in block else "videos"
    if block["protocol"] == "stills":
        return {key: paired_difference(*pair, key=key, unit=unit) for key in ITEM_KEYS}
    return paired_difference(*pair, key="fidelity" if block["protocol"] == "fidelity" else "J&F", unit=unit)


def headline(block: Mapping[str, Any]) -> str:
    """The scores of a block as text, and how much they are of."""
    keys = [key for key in ("J&F", "J", "F", "fidelity", "point_mIoU", "box_mIoU") if block.get(key) is not None]
    scores, amount = ", ".join(f"{key} {block[key]:.1f}" for key in keys), amount_text(block)
    return f"{scores} ({amount})" if amount else scores


def difference_lines(block: Mapping[str, Any]) -> list[str]:
    """Differences to the reference as text, with their intervals; none without a reference."""
    versus = block.get("versus_reference")
    if versus is None:
        return []
    name = "fidelity" if block["protocol"] == "fidelity" else "J&F"
    parts = {name: versus} if "difference" in versus else versus
    return [f"{key} against the reference: {interval_text(part)}, {interval_note(part)}" for key, part in parts.items()]


def evaluate_model(
    target: str,
    overrides: Sequence[str] = (),
    *,
    reference: str | None = None,
    fast: bool = False,
    save_masks: Path | None = None,
) -> dict[str, Any]:
    """The score block of a MODEL: J&F on videos, point and box mIoU on stills, in percent.

    Args:
        target: run folder, file or size.
        overrides: `key=value` on top of the model's own recipe.
        reference: another MODEL, run at the same image size; adds `fidelity` and `versus_reference` (differences in
            J&F or IoU with their 95 % intervals).
        fast: made for speed, see `make_fast`; the reference stays as it is.
        save_masks: new folder for the tracked masks, see `write_masks`.

    Raises:
        UserError: the model or the data cannot be used.
    """
    model, recipe = load_model(target, [*FAST_MEMORY, *overrides] if fast else overrides)
    other = None
    if reference is not None:
        size = recipe.model.image_size
        other, _ = load_model(reference, [*([f"model.image_size={size}"] if size else []), *overrides])
    if fast:
        model = make_fast(model.to(device_of(recipe.trainer)))
    return {"fidelity": None, **score_against(model, other, recipe, save_masks=save_masks), "model": target}


def score_against(
    model: SAM2, reference: SAM2 | None, recipe: Recipe, *, save_masks: Path | None = None
) -> dict[str, Any]:
    """The score block of a model on the recipe's data, with `fidelity` and `versus_reference` if a reference is given.

    The model keeps and reads its memory as the recipe says, the reference as `sam2` does.

    Raises:
        UserError: the data cannot be used.
    """
    videos = open_val(recipe)
    if save_masks is not None:
        check_masks_folder(save_masks, videos)
        if not _alone(recipe.trainer):
            raise UserError(
                f"--save-masks needs one process, trainer.devices={recipe.trainer.devices} makes several: give 1"
            )
    if not has_masks(videos):
        if reference is None or next(quantizers(reference), None) is not None:
            raise UserError(
                f"data {recipe.data.scored} has no masks, its score is the fidelity to a float model: give that model "
                "with --reference"
            )
        videos = label_videos(videos, reference.to(device_of(recipe.trainer)), recipe.data.max_objects)
    use_memory(model, recipe.memory)
    settings = recipe.evaluate, recipe.trainer
    if reference is None:
        scorer = score_any if isinstance(model, FastSAM2) else score_float  # kept scores are not of fast models
        block, masks = scorer(model, videos, *settings)
    else:
        their_block, their_masks = score_float(reference, videos, *settings)
        block, masks = score_any(model, videos, *settings, reference=their_masks)
        block["versus_reference"] = compare(block, their_block)
    if save_masks is not None:
        write_masks(save_masks, videos, masks, recipe.evaluate)
    return block


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


class ScoreOnTheWay(Callback):
    """Scores a copy of the model every `evaluate.every` training steps, into `on_the_way` of `metrics.json`.

    With averaged weights (`train.ema`) the scores are those of the trained ones.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.paused = run, 0.0
        self.started = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        done = module.steps_before + trainer.global_step
        self.rows = [row for row in self.run.folder.metrics.get("on_the_way", []) if row["step"] <= done]
        trained = self.rows[-1]["seconds"] if self.rows else 0.0
        self.started, self.paused = time.perf_counter() - trained, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step, recipe = module.steps_before + trainer.global_step, self.run.recipe
        assert recipe.evaluate.every is not None
        scored = self.rows[-1]["step"] if self.rows else 0
        if step % recipe.evaluate.every or step == scored:  # a step can have several batches
            return
        paused = time.perf_counter()
        model = copy.deepcopy(self.run.model).eval()  # with the bits of the stage; finalized, it would compute the same
        reference = self.run.predictions.get("float")
        block = score_any(model, self.run.videos, recipe.evaluate, recipe.trainer, reference=reference, silent=True)[0]
        scores = {key: block[key] for key in ("J&F", "fidelity") if block.get(key) is not None}
        self.rows.append({"step": step, "seconds": round(paused - self.started - self.paused, 1), **scores})
        self.paused += time.perf_counter() - paused
        self.run.folder.record("on_the_way", self.rows)
        for logger in trainer.loggers:
            logger.log_metrics({f"{ON_THE_WAY}/{key}": value for key, value in scores.items()}, step)
        log.info("step %d: %s", step, ", ".join(f"{key} {value:.1f}" for key, value in scores.items()))


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
    trainer = build_trainer(recipe.trainer, folder=folder.path)
    file = folder.stages / f"{name}-{trainer.global_rank}-of-{trainer.world_size}.npz"  # each rank has its own masks
    if name in folder.metrics and (stored := stored_masks(file)) is not None:  # before the run was resumed
        _, run.predictions[name] = stored
        log.info("%s was scored before: %s", name, headline(folder.metrics[name]))
        return
    if reference is not None:
        log.info("%s", audit(model.to(run.device), run.layers, recipe.quantize, lambda: track_noise(model)))
    settings = recipe.evaluate, recipe.trainer
    with folder.stage(f"score {name}", f"{len(run.videos)} videos"):
        if reference is None and model.memory_reader is None:  # cached scores are of models that read memory as sam2
            block, predictions = score_float(model, run.videos, *settings)
        else:
            block, predictions = score_any(model, run.videos, *settings, reference=reference)
    if run.stills:
        with folder.stage(f"score {name} on stills", f"{len(run.stills)} images"):
            boxes, _ = (score_float if reference is None else score_any)(model, run.stills, *settings)
        block |= {"box_mIoU": boxes["box_mIoU"], "stills": boxes}
        log.info("%s: box-prompt mIoU %.1f", name, boxes["box_mIoU"])
    if reference is not None:
        block["versus_float"] = compare(block, folder.metrics["float"])
        if name == "quantized" and "ptq" in folder.metrics:
            block["versus_ptq"] = compare(block, folder.metrics["ptq"])
    store_masks(file, predictions)
    folder.record(name, block)
    log.info("%s: %s", name, headline(block))
    run.predictions[name] = predictions
