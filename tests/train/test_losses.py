"""Our losses against Meta's own construction; distillation by its properties."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.models import SAM2
from qsam2.recipe.recipe import LossRecipe, PromptRecipe
from qsam2.train.losses import embedding_distillation, mask_distillation, segmentation_loss
from qsam2.train.video_training import set_prompts

PROMPTS = {
    "points": PromptRecipe(point=1, box=0, correction_clicks=2),
    "boxes": PromptRecipe(point=0, box=1, correction_clicks=2),
    "masks": PromptRecipe(point=0, box=0),
}


def forward(model: SAM2, batch: BatchedVideoDatapoint, prompts: PromptRecipe) -> list[dict]:
    set_prompts(model.train(), prompts)
    model.rng = np.random.default_rng(0)
    torch.manual_seed(0)
    return model(batch)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_segmentation_loss_is_metas(prompts: str, meta: DictConfig, model: SAM2, batch: BatchedVideoDatapoint) -> None:
    frames = forward(model, batch, PROMPTS[prompts])
    ours = segmentation_loss(LossRecipe())(frames, batch.masks)
    theirs = instantiate(meta.loss.all)(frames, batch.masks)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float(value) > 0
        assert float(ours[name]) == pytest.approx(float(value), rel=1e-6), name


def test_weights_of_the_recipe_scale_the_losses(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    frames = forward(model, batch, PROMPTS["masks"])
    for key, name in {"focal": "mask", "dice": "dice", "iou": "iou", "object_score": "class"}.items():
        only = LossRecipe(**{"focal": 0.0, "dice": 0.0, "iou": 0.0, "object_score": 0.0, key: 3.0})
        losses = segmentation_loss(only)(frames, batch.masks)
        assert float(losses["core_loss"]) == pytest.approx(3 * float(losses[f"loss_{name}"]), rel=1e-6)


def test_no_distance_between_equal_models(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    teacher = copy.deepcopy(model)
    ours, theirs = (forward(each, batch, PROMPTS["masks"]) for each in (model, teacher))
    assert float(mask_distillation(ours, theirs)) == pytest.approx(0.0, abs=1e-6)
    levels = [each.forward_image(batch.flat_img_batch)["backbone_fpn"] for each in (model, teacher)]
    assert float(embedding_distillation(*levels)) == 0.0


def test_distance_to_another_model_falls_along_its_gradient(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        their_frames = forward(teacher, batch, PROMPTS["masks"])
        their_levels = teacher.forward_image(batch.flat_img_batch)["backbone_fpn"]

    def masks() -> Tensor:
        return mask_distillation(forward(model, batch, PROMPTS["masks"]), their_frames)

    def embeddings() -> Tensor:
        return embedding_distillation(model.forward_image(batch.flat_img_batch)["backbone_fpn"], their_levels)

    for distance in (masks, embeddings):
        model.zero_grad()
        before = distance()
        assert float(before) > 0
        before.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        square = sum(float(gradient.square().sum()) for gradient in gradients.values())
        step = 0.02 * float(before.detach()) / square  # to first order, 2 % off
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter.sub_(step * gradients[name])
        assert float(distance()) == pytest.approx(0.98 * float(before), rel=0.01)


def test_distance_ignores_how_sure_absence_is() -> None:
    # sam2 writes -1024 where an object is absent: a logit that a model does not give, with an infinite distance to it
    absent, unlikely = ([{"pred_masks": torch.full((1, 1, 4, 4), logit)}] for logit in (-1024.0, -32.0))
    assert float(mask_distillation(unlikely, absent)) == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(float(mask_distillation([{"pred_masks": torch.full((1, 1, 4, 4), 10.0)}], absent)))


def test_mask_distance_is_the_divergence_of_bernoulli_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([{"pred_masks": torch.randn(2, 1, 5, 5, generator=generator)} for _ in range(3)] for _ in range(2))
    expected = 0.0
    for student, teacher in zip(ours, theirs, strict=True):
        q, p = (1 / (1 + np.exp(-frame["pred_masks"].double().numpy())) for frame in (student, teacher))
        expected += np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert float(mask_distillation(ours, theirs)) == pytest.approx(expected, rel=1e-5)
