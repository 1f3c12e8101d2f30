"""Prompts while training, and the deterministic ones that calibration uses."""

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
"""Coordinates (objects, 1, 2) and labels (objects, 1) of a click each."""


def set_prompts(model: SAM2, prompts: PromptRecipe) -> None:
    """Make `SAM2Train` draw prompts as the recipe says."""
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
def record_clicks(given: Sequence[Click] | None = None) -> Iterator[list[Click]]:
    """Collects the clicks that `SAM2Train` draws; with `given` it gets these, in their order, instead.

    Correction clicks are drawn where a model errs: only so are two models, a student and its teacher, asked the same.
    """
    draw = training.model.sam2.get_next_point
    clicks: list[Click] = []

    def get_next_point(**kwargs: Any) -> Click:
        clicks.append(draw(**kwargs) if given is None else given[len(clicks)])
        return clicks[-1]

    with replaced(training.model.sam2, get_next_point=get_next_point):
        yield clicks


@torch.no_grad()
def prompted_forward(model: SAM2, batch: BatchedVideoDatapoint, *, points: bool) -> list[dict[str, Any]]:
    """Track a batch of clips in eval mode from mask prompts, or from a click and one correction, always the same.

    Returns a frame's outputs each, as `SAM2Train.forward`.
    """
    model.prob_to_use_pt_input_for_eval = float(points)
    model.num_correction_pt_per_frame = 1
    model.forward_backbone_per_frame_for_eval = True  # a clip at a time would not fit at 1024 px
    return model(batch)
