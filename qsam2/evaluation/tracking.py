"""Semi-supervised tracking of videos and its scores: first masks in, masks of all frames and J&F out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from qsam2.data.transforms import FrameSequence
from qsam2.data.unlabelled import OWN_MASKS, has_masks
from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.evaluation.metrics.scores import Fidelity, VOSScore, remarks
from qsam2.models import SAM2
from qsam2.models.replaced import hide_progress_bar, replaced
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.run import is_first_rank
from qsam2.train.trainer import build_trainer

log = logging.getLogger("qsam2")


def first_masks(video: Video, length: int) -> dict[int, dict[int, np.ndarray]]:
    """The prompts of semi-supervised tracking: {frame: {object id: bool (H, W)}}, each object where it first appears.

    Looks at the first `length` frames.

    Raises:
        UserError: no object is ever seen.
    """
    prompts: dict[int, dict[int, np.ndarray]] = {}
    seen: set[int] = set()
    for index in range(length):
        masks = video.masks(index) or {}
        if new := {object_id: mask for object_id, mask in masks.items() if object_id not in seen and mask.any()}:
            prompts[index] = new
            seen |= new.keys()
    if not prompts:
        raise UserError(f"video {video.name}: no mask to start from in its first {length} frames")
    return prompts


def track(
    model: SAM2, video: Video, prompts: dict[int, dict[int, np.ndarray]], *, length: int, non_overlapping: bool
) -> dict[int, np.ndarray]:
    """Masks of all prompted objects over the first `length` frames: {object id: bool (length, H, W)}.

    As Meta's `vos_inference.py` without post-processing: logits above 0, no hole filling. Frames before an object's
    prompt are empty. Objects that share a prompt frame are tracked in one pass; memory attention sees each object on
    its own in any case.

    Args:
        prompts: see `first_masks`.
        non_overlapping: a pixel belongs to one object only: the one with the highest logit, of objects that are
            prompted on different frames the one with the lowest id.
    """
    frames = FrameSequence(video, model.image_size, length)
    tracked: dict[int, np.ndarray] = {}
    # Meta's evaluation leaves the memory of prompted frames as it is; sam2 binarizes it for interactive use
    settings = {"non_overlap_masks": non_overlapping, "binarize_mask_from_pts_for_mem_enc": False}
    with replaced(model, **settings), hide_progress_bar():
        for start, masks in prompts.items():
            state = model.init_state(frames, video_size=video.size)
            for object_id, mask in masks.items():
                model.add_new_mask(state, start, object_id, torch.from_numpy(mask))
                tracked[object_id] = np.zeros((length, *video.size), dtype=bool)
            for index, object_ids, logits in model.propagate_in_video(state, start_frame_idx=start):
                for object_id, object_logits in zip(object_ids, logits[:, 0], strict=True):
                    tracked[object_id][index] = (object_logits > 0).cpu().numpy()
    if non_overlapping and len(prompts) > 1:  # passes do not see one another: the lowest id wins, as in a palette PNG
        taken = np.zeros((length, *video.size), dtype=bool)
        for object_id in sorted(tracked):
            tracked[object_id] &= ~taken
            taken |= tracked[object_id]
    return tracked


def true_masks(video: Video, object_id: int, length: int) -> tuple[list[int], np.ndarray]:
    """(indices of the annotated frames, the object's true masks on them: bool (frames, H, W))."""
    annotated = [(index, masks) for index in range(length) if (masks := video.masks(index)) is not None]
    empty = np.zeros(video.size, dtype=bool)
    return [index for index, _ in annotated], np.stack([masks.get(object_id, empty) for _, masks in annotated])


class VideoScoring(L.LightningModule):
    """Semi-supervised tracking as a task to validate: the score block in `block`, this rank's masks in `predictions`.

    Every rank scores its share of the videos, none twice: rank r of W takes r, r + W, ...
    """

    def __init__(
        self, model: SAM2, videos: Sequence[Video], evaluation: EvaluateRecipe, reference: Predictions | None
    ) -> None:
        super().__init__()
        self.model = model
        self.videos = videos
        self.evaluation = evaluation
        self.reference = reference
        self.has_truth = has_masks(videos)
        self.predictions: Predictions = {}
        self.score = VOSScore(evaluation.protocol)
        self.fidelity = Fidelity()
        self.seconds_per_frame: list[float] = []

    def val_dataloader(self) -> DataLoader[Video | None]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        steps = -(-len(self.videos) // world)  # Lightning wants a batch on every rank, and ranks that stop together
        padded: list[Any] = [*self.videos, *[None] * (steps * world - len(self.videos))]
        return DataLoader(padded[rank::world], batch_size=None)  # type: ignore[arg-type]  # PyTorch takes a list

    def validation_step(self, video: Video | None, batch_index: int) -> None:
        if video is None:  # this rank has no more videos, others have one
            return
        length = min(len(video), self.evaluation.frames or len(video))
        prompts = first_masks(video, length)
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


def score_videos(
    model: SAM2,
    videos: Sequence[Video],
    evaluation: EvaluateRecipe,
    trainer: TrainerRecipe,
    *,
    reference: Predictions | None = None,
    silent: bool = False,
) -> tuple[dict[str, Any], Predictions]:
    """Score block of semi-supervised tracking by the recipe's protocol, in percent, and this rank's tracked masks.

    Args:
        reference: the float model's masks on the same videos; with them the block holds `fidelity`. For videos without
            true masks the block holds `fidelity` alone, which is 100 for the reference itself.
        silent: show no progress.
    """
    module = VideoScoring(model, videos, evaluation, reference)
    precise = trainer.model_copy(update={"precision": evaluation.precision})
    build_trainer(precise, folder=Path("."), silent=silent).validate(module, verbose=False)
    if reference is None and is_first_rank():  # the reference's own scoring has said it
        say_left_out(module.block)
    return module.block, module.predictions


def say_left_out(block: Mapping[str, Any]) -> None:
    """Log what a score block leaves out."""
    if left_out := block.get("left_out"):
        log.warning("not scored: %s", "; ".join(remarks(left_out)))
