"""Prompts of training clips: drawn at random as the recipe says, or deterministic, as calibration needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import training.model.sam2
from sam2.modeling.sam.transformer import Attention
from torch import Tensor, nn
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.models import SAM2
from qsam2.models.replaced import replaced
from qsam2.recipe.recipe import PromptRecipe

Click = tuple[Tensor, Tensor]
"""One click per object: coordinates (objects, 1, 2) and labels (objects, 1)."""


def set_prompts(model: SAM2, prompts: PromptRecipe) -> None:
    """Set the probabilities with which `SAM2Train` draws prompts."""
    points = prompts.point + prompts.box
    model.prob_to_use_pt_input_for_train = points
    model.prob_to_use_box_input_for_train = prompts.box / points if points else 0.0
    model.num_init_cond_frames_for_train = prompts.conditioning_frames
    model.rand_init_cond_frames_for_train = True
    model.num_frames_to_correct_for_train = prompts.correction_frames
    model.rand_frames_to_correct_for_train = True
    model.num_correction_pt_per_frame = prompts.correction_clicks
    model.prob_to_sample_from_gt_for_train = prompts.clicks_from_ground_truth
    model.add_all_frames_to_correct_as_cond = True


def set_dropout(model: nn.Module, share: float) -> None:
    """Set the dropout of all layers and attentions."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif isinstance(module, Attention):
            module.dropout_p = share


@contextlib.contextmanager
def record_clicks(replay: Sequence[Click] | None = None) -> Iterator[list[Click]]:
    """Context manager that collects the clicks that `SAM2Train` draws, or makes it use those of `replay` in order.

    Correction clicks depend on the model's errors; replaying gives a teacher the same prompts as its student.
    """
    draw = training.model.sam2.get_next_point
    clicks: list[Click] = []

    def get_next_point(**kwargs: Any) -> Click:
        clicks.append(draw(**kwargs) if replay is None else replay[len(clicks)])
        return clicks[-1]

    with replaced(training.model.sam2, get_next_point=get_next_point):
        yield clicks


@torch.no_grad()
def prompted_forward(model: SAM2, batch: BatchedVideoDatapoint, *, points: bool) -> list[dict[str, Any]]:
    """Track a batch of clips in eval mode from mask prompts or (`points`) a click and one correction, always the same.

    Returns the outputs of each frame, as `SAM2Train.forward` does.
    """
    model.prob_to_use_pt_input_for_eval = float(points)
    model.num_correction_pt_per_frame = 1
    model.forward_backbone_per_frame_for_eval = True  # whole clips do not fit into memory at 1024 px
    return model(batch)
