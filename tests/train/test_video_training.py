"""The Lightning module while it trains: modes, prompts, randomness that follows from (seed, step)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.recipe import build_recipe
from qsam2.recipe.recipe import PromptRecipe, TrainRecipe
from qsam2.train.trainer import build_trainer
from qsam2.train.video_training import VideoTraining, record_clicks, set_prompts

CLICKS = {"conditioning_frames": 1, "correction_frames": 1, "correction_clicks": 1}


class Watch(Callback):
    """Modes and prompts of every forward."""

    def __init__(self) -> None:
        self.training: set[bool] = set()
        self.clicked: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_index: int) -> None:
        self.training |= {child.training for child in module.model.modules()}
        self.training |= {child.training for teacher in module._teacher for child in teacher.modules()}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.clicked.append(module.clicked)


class Watched(VideoTraining):
    """Notes what the model was prompted with."""

    def training_step(self, batch: BatchedVideoDatapoint, batch_index: int) -> torch.Tensor:
        prompt_inputs = self.model.prepare_prompt_inputs

        def noted(*args: Any) -> dict[str, Any]:
            inputs = prompt_inputs(*args)
            self.clicked = inputs["use_pt_input"]
            return inputs

        self.model.prepare_prompt_inputs = noted  # type: ignore[method-assign]
        try:
            return super().training_step(batch, batch_index)
        finally:
            del self.model.prepare_prompt_inputs


def fit(
    module: VideoTraining,
    batches: list[BatchedVideoDatapoint],
    folder: Path,
    *callbacks: Callback,
    precision: str = "32-true",
) -> None:
    recipe = build_recipe({"trainer": {"accelerator": "cpu", "devices": 1, "precision": precision}}).trainer
    trainer = build_trainer(recipe, folder=folder, callbacks=callbacks, max_steps=len(batches))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))


def test_models_train_in_training_mode_whatever_they_came_in(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    recipe = TrainRecipe(prompts={"point": 1, "box": 0, **CLICKS}, distill={"mask_logits": 1})
    module = Watched(model.eval(), recipe, max_steps=2, teacher=copy.deepcopy(model))
    watch = Watch()
    fit(module, [batch, batch], tmp_path, watch)
    assert watch.training == {True}
    assert watch.clicked == [True, True]


def test_an_image_encoder_whose_rate_is_0_stays_as_it_is(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.state_dict())
    recipe = TrainRecipe(image_encoder_lr=0, lr=1e-3, weight_decay=0.1, ema=0.9)
    fit(VideoTraining(model, recipe, max_steps=2), [batch, batch], tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("image_encoder.") for name in changed)
    assert {name.partition(".")[0] for name in changed} >= {"memory_attention", "memory_encoder", "sam_mask_decoder"}
    assert all(parameter.grad is None for parameter in model.image_encoder.parameters())


@pytest.mark.parametrize(
    ("precision", "able", "warned"), [("bf16-mixed", False, 1), ("bf16-mixed", True, 0), ("32-true", False, 0)]
)
def test_a_processor_without_bf16_products_is_warned_of(
    model: SAM2,
    batch: BatchedVideoDatapoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    able: bool,
    warned: int,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    module = VideoTraining(model, TrainRecipe(), max_steps=1)
    fit(module, [batch], tmp_path, precision=precision)
    assert sum("trainer.precision=32-true is several times faster" in message for message in caplog.messages) == warned


def test_a_student_equal_to_its_teacher_has_no_distance_from_it(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    distill = {"mask_logits": 1, "image_embeddings": 1}
    recipe = TrainRecipe(prompts={"point": 1, "box": 0, **CLICKS}, distill=distill)
    module = VideoTraining(model, recipe, max_steps=1, teacher=copy.deepcopy(model))
    module.train()
    module._teacher[0].train()  # as Lightning's hook does
    logged: dict[str, Tensor] = {}
    module.log_dict = logged.update  # type: ignore[method-assign]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for step in range(3):  # clicks are drawn at random, where the masks are wrong
        module._seed_step(step)
        module._loss(batch)
        assert logged["loss/distill_masks"] == 0
        assert logged["loss/distill_embeddings"] == 0
    with torch.no_grad():
        model.memory_encoder.out_proj.weight.mul_(1.1)
    module._loss(batch)
    assert logged["loss/distill_embeddings"] == 0 < logged["loss/distill_masks"]
    assert logged["loss/distill_masks"].requires_grad


def test_clicks_of_one_forward_are_given_to_another(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    set_prompts(model, PromptRecipe(point=1, box=0, **CLICKS))
    backbone = model.train().prepare_prompt_inputs(model.forward_image(batch.flat_img_batch), batch)
    with record_clicks() as drawn:
        model.forward_tracking({**backbone}, batch)
    with record_clicks(drawn) as given:
        model.forward_tracking({**backbone}, batch)
    with record_clicks() as others:
        model.forward_tracking({**backbone}, batch)
    assert len(drawn) == CLICKS["correction_clicks"]
    assert all(one is other for one, other in zip(drawn, given, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(drawn[0], others[0], strict=True))


def test_prompts_are_drawn_by_the_recipes_shares(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    module = VideoTraining(model, TrainRecipe(prompts={"point": 0.3, "box": 0.3, **CLICKS}), max_steps=1)
    module.train()
    kinds = {"mask": 0, "point": 0, "box": 0}
    steps = 400
    for step in range(steps):
        module._seed_step(step)
        inputs = model.prepare_prompt_inputs({}, batch)
        if not inputs["use_pt_input"]:
            kinds["mask"] += 1
        else:
            labels = inputs["point_inputs_per_frame"][0]["point_labels"]
            kinds["box" if 2 in labels else "point"] += 1
    deviation = (0.3 * 0.7 / steps) ** 0.5
    assert kinds["point"] / steps == pytest.approx(0.3, abs=4 * deviation)
    assert kinds["box"] / steps == pytest.approx(0.3, abs=4 * deviation)


def test_a_step_is_random_by_seed_and_index_alone(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    def draw(seed: int, step: int) -> tuple[float, float]:
        module = VideoTraining(model, TrainRecipe(), seed=seed, max_steps=1)
        module._seed_step(step)
        return float(model.rng.random()), float(torch.rand(1))

    torch.manual_seed(1)
    first = draw(0, 5)
    torch.rand(7)
    assert draw(0, 5) == first
    assert len({draw(seed, step) for seed in (0, 1) for step in (5, 6)}) == 4


def test_a_loss_that_is_not_finite_stops_the_run(model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path) -> None:
    with torch.no_grad():
        model.sam_mask_decoder.iou_token.weight.fill_(np.nan)
    module = VideoTraining(model, TrainRecipe(prompts={"point": 0, "box": 0, **CLICKS}), max_steps=1)
    with pytest.raises(UserError, match=r"^the loss is nan at step 0; lower train.lr$"):
        fit(module, [batch], tmp_path)
