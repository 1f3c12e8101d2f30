"""Meta's segmentation losses, and distillation from the float model (ours)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training.loss_fns import MultiStepMultiMasksAndIous

from qsam2.quantizers.observers import all_reduce, world_size
from qsam2.recipe.recipe import LossRecipe


def segmentation_loss(recipe: LossRecipe) -> MultiStepMultiMasksAndIous:
    """Meta's loss over all frames and click steps, with the options of sam2.1_hiera_b+_MOSE_finetune.yaml."""
    return MultiStepMultiMasksAndIous(
        {
            "loss_mask": recipe.focal,
            "loss_dice": recipe.dice,
            "loss_iou": recipe.iou,
            "loss_class": recipe.object_score,
        },
        focal_alpha=0.25,
        focal_gamma=2.0,
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0.0,
        focal_alpha_obj_score=-1.0,
    )


def mask_distillation(student: list[dict[str, Any]], teacher: list[dict[str, Any]]) -> Tensor:
    """Kullback-Leibler divergence of the pixels' foreground probabilities, summed over frames.

    Mean over pixels and over the objects of all ranks, as in Meta's losses.

    Args:
        student, teacher: outputs per frame, with `pred_masks`: logits (objects, 1, H/4, W/4).
    """
    first = student[0]["pred_masks"]
    objects = all_reduce(torch.tensor(float(len(first)), device=first.device)) / world_size()
    total = torch.zeros((), device=first.device)
    for frame, teacher_frame in zip(student, teacher, strict=True):
        logits = frame["pred_masks"].clamp(-32, 32)  # -1024 in sam2 if an object is absent
        target = teacher_frame["pred_masks"].clamp(-32, 32)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target.sigmoid(), reduction="none")
        entropy = F.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="none")
        total = total + (cross_entropy - entropy).mean((1, 2, 3)).sum() / objects
    return total


def embedding_distillation(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Squared error of the image embeddings over the teacher's variance per image, summed over levels.

    Args:
        student, teacher: features (frames, C, H, W) per level.
    """
    errors = [
        ((x - target).square().mean((1, 2, 3)) / target.var((1, 2, 3))).mean()
        for x, target in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).sum()
