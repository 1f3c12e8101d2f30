"""The Lightning module that scores a model on videos."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import numpy as np

from qsam2.data.unlabelled import OWN_MASKS
from qsam2.data.video import Predictions, Video
from qsam2.evaluation.metrics.iou import Fidelity
from qsam2.evaluation.metrics.vos import VOSScore
from qsam2.evaluation.tracking import first_masks, track, true_masks
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe


class VideoScoring(L.LightningModule):
    """Semi-supervised tracking as a task to validate: J&F by the recipe's protocol in `block`, masks in `predictions`.

    Args:
        reference: predictions of the float model on the same videos; with them the block holds `fidelity`.
        has_truth: the videos come with true masks; without them the block holds `fidelity` alone, which is 100 for the
            reference itself.
    """

    def __init__(
        self,
        model: SAM2,
        evaluation: EvaluateRecipe,
        *,
        reference: Predictions | None = None,
        has_truth: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.evaluation = evaluation
        self.reference = reference
        self.has_truth = has_truth
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
            self.predictions[video.name, object_id] = np.packbits(masks)
            if self.has_truth:
                annotated, truth = true_masks(video, object_id, length)
                self.score.update(video.name, object_id, masks[annotated], truth)
            if self.reference is not None:
                reference = np.unpackbits(self.reference[video.name, object_id], count=masks.size)
                self.fidelity.update(video.name, object_id, masks, reference.reshape(masks.shape).astype(bool))
            elif not self.has_truth:
                self.fidelity.update(video.name, object_id, masks, masks)

    def on_validation_epoch_end(self) -> None:
        self.block: dict[str, Any]
        if not self.has_truth:
            self.block = {"protocol": "fidelity", "prompts": OWN_MASKS, **self.fidelity.compute()}
        else:
            self.block = self.score.compute()
            if self.reference is not None:
                self.block["fidelity"] = self.fidelity.compute()["fidelity"]
        self.block["precision"] = self.evaluation.precision
        self.block["seconds_per_frame"] = float(np.mean(self.seconds_per_frame)) if self.seconds_per_frame else None
        self.score.reset()
        self.fidelity.reset()
