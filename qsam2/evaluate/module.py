"""The Lightning module that scores a model on videos."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import numpy as np

from qsam2.data.video import Predictions, Video
from qsam2.evaluate.metrics.iou import Fidelity
from qsam2.evaluate.metrics.vos import VOSScore
from qsam2.evaluate.tracking import first_masks, track, true_masks
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe


class VideoScoring(L.LightningModule):
    """Semi-supervised tracking as a task to validate: J&F by the recipe's protocol in `block`, masks in `predictions`.

    Args:
        reference: predictions of the float model on the same videos; with them the block holds `fidelity`.
    """

    def __init__(self, model: SAM2, evaluation: EvaluateRecipe, *, reference: Predictions | None = None) -> None:
        super().__init__()
        self.model = model
        self.evaluation = evaluation
        self.reference = reference
        self.predictions: Predictions = {}
        self.score = VOSScore(evaluation.protocol)
        self.fidelity = Fidelity()
        self.seconds_per_frame: list[float] = []

    def on_validation_epoch_start(self) -> None:
        self.predictions = {}
        self.seconds_per_frame = []

    def validation_step(self, video: Video | None, batch_index: int) -> None:
        if video is None:  # this rank has no more videos, others have one
            return
        length = min(len(video), self.evaluation.frames or len(video))
        prompts = first_masks(video, length, later_objects=self.evaluation.protocol == "sav")
        started = time.perf_counter()
        tracked = track(self.model, video, prompts, length=length, non_overlapping=self.evaluation.protocol == "davis")
        self.seconds_per_frame.append((time.perf_counter() - started) / length)
        for object_id, masks in tracked.items():
            annotated, truth = true_masks(video, object_id, length)
            packed = np.packbits(masks)
            self.predictions[video.name, object_id] = packed
            self.score.update(video.name, object_id, masks[annotated], truth)
            if self.reference is not None:
                theirs = np.unpackbits(self.reference[video.name, object_id], count=masks.size)
                self.fidelity.update(video.name, object_id, masks, theirs.reshape(masks.shape).astype(bool))

    def on_validation_epoch_end(self) -> None:
        self.block: dict[str, Any] = self.score.compute()
        self.block["precision"] = self.evaluation.precision
        self.block["seconds_per_frame"] = float(np.mean(self.seconds_per_frame)) if self.seconds_per_frame else None
        if self.reference is not None:
            self.block["fidelity"] = self.fidelity.compute()
        self.score.reset()
        self.fidelity.reset()
