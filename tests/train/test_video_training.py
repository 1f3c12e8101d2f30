"""The Lightning module while it trains: modes, prompts, randomness of a step, and the Trainer's choices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from messages import Message
from omegaconf import DictConfig
from sam2.modeling.sam2_utils import DropPath
from small_runs import TRAIN_FLOAT, W4A4, small
from torch import Tensor
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.errors import UserError
from qsam2.models import SAM2, build_sam2
from qsam2.pipeline import begin
from qsam2.recipe import build_recipe
from qsam2.recipe.load import merge
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.recipe.train import DistillRecipe, PromptRecipe, TrainRecipe
from qsam2.run import RunFolder
from qsam2.train.losses import relative_error
from qsam2.train.optimizer import frozen
from qsam2.train.trainer import FreezeStatistics, SafeCheckpointIO, WeightAverage, build_trainer, choose_strategy
from qsam2.train.video_training import (
    StillTraining,
    VideoTraining,
    check_finite,
    prompted_forward,
    record_clicks,
    set_dropout,
    set_prompts,
    train,
)

DRAWN = (
    "prob_to_use_pt_input_for_train",
    "prob_to_use_box_input_for_train",
    "prob_to_sample_from_gt_for_train",
    "num_frames_to_correct_for_train",
    "rand_frames_to_correct_for_train",
    "add_all_frames_to_correct_as_cond",
    "num_init_cond_frames_for_train",
    "rand_init_cond_frames_for_train",
    "num_correction_pt_per_frame",
)
SIZE_PX = 64
DDP = "ddp_find_unused_parameters_true"
CLICKS = {"conditioning_frames": 1, "correction_frames": 1, "correction_clicks": 1}


def fit(
    module: VideoTraining,
    batches: list[BatchedVideoDatapoint],
    folder: Path,
    precision: str = "32-true",
    callbacks: Sequence[Callback] = (),
) -> None:
    recipe = build_recipe({"trainer": {"accelerator": "cpu", "devices": 1, "precision": precision}}).trainer
    trainer = build_trainer(recipe, folder=folder, max_steps=len(batches), callbacks=callbacks)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))


def test_models_train_in_training_mode_and_with_clicks_whatever_they_came_in(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TrainRecipe(prompts={"point": 1, "box": 0, **CLICKS}, distill={"mask_logits": 1})
    module = VideoTraining(model.eval(), recipe, max_steps=2, teacher=copy.deepcopy(model))
    prompt_inputs, modes, clicked = SAM2.prepare_prompt_inputs, set(), []

    def noted(network: SAM2, *args: Any) -> dict[str, Any]:
        inputs = prompt_inputs(network, *args)
        clicked.append(inputs["use_pt_input"])
        modes.update(child.training for each in (network, module._teacher[0]) for child in each.modules())
        return inputs

    monkeypatch.setattr(SAM2, "prepare_prompt_inputs", noted)
    fit(module, [batch, batch], tmp_path)
    assert modes == {True} and clicked == [True, True]


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


def test_a_batch_whose_frames_are_all_prompted_by_masks_teaches_nothing(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    """sam2 gives such masks back as they are, without a graph."""
    before = copy.deepcopy(model.state_dict())
    prompts = {"point": 0, "box": 0, "conditioning_frames": batch.num_frames, "correction_frames": batch.num_frames}
    recipe = TrainRecipe(prompts=prompts, lr=1e-3, image_encoder_lr=1e-3, weight_decay=0)
    module = VideoTraining(model, recipe, max_steps=1)
    model.rand_init_cond_frames_for_train = False
    fit(module, [batch], tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stills_train_the_image_encoder_alone_towards_the_teachers_embeddings(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.image_encoder.trunk.blocks[0].parameters():
            parameter.mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    module = StillTraining(model, TrainRecipe(lr=1e-3, image_encoder_lr=1e-3), max_steps=12, teacher=teacher)
    distances = []

    def distance() -> None:
        pair = (each.eval().forward_image(batch.flat_img_batch)["backbone_fpn"] for each in (model, teacher))
        distances.append(float(relative_error(*pair)))

    with torch.no_grad():
        distance()
    with frozen(value for name, value in model.named_parameters() if not name.startswith(StillTraining.part)):
        fit(module, [batch] * 12, tmp_path)
    with torch.no_grad():
        distance()
    assert distances[1] < 0.7 * distances[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("image_encoder.") for name in changed)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize(("precision", "able"), [("bf16-mixed", False), ("bf16-mixed", True), ("32-true", False)])
def test_a_processor_without_bf16_products_is_warned_of(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, precision: str, able: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    fit(VideoTraining(model, TrainRecipe(), max_steps=1), [batch], tmp_path, precision)
    warned = sum("trainer.precision=32-true is several times faster" in message for message in caplog.messages)
    assert warned == (precision == "bf16-mixed" and not able)


def test_a_student_equal_to_its_teacher_has_no_distance_from_it(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    names = sorted(DistillRecipe.model_fields.keys() - {"imagenet"})
    recipe = TrainRecipe(prompts={"point": 1, "box": 0, **CLICKS}, distill=dict.fromkeys(names, 1))
    module = VideoTraining(model, recipe, max_steps=1, teacher=copy.deepcopy(model))
    module.train()
    module._teacher[0].train()  # as Lightning's hook does
    logged: dict[str, Tensor] = {}
    module.log_dict = logged.update  # type: ignore[method-assign]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for step in range(3):  # clicks are drawn at random, where the masks are wrong
        module._seed_step(step)
        module._loss(batch)
        assert [float(logged[f"loss/distill_{name}"]) for name in names] == [0.0] * len(names)
    with torch.no_grad():
        model.memory_encoder.out_proj.weight.mul_(1.1)
    module._loss(batch)
    assert logged.pop("loss/distill_image_embeddings") == 0
    for name in names:
        distance = logged.get(f"loss/distill_{name}")
        assert distance is None or (float(distance) > 0 and distance.requires_grad), name
    assert not any("teacher" in name for name in module.state_dict())


def test_distillation_counts_by_its_weight(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    teacher = copy.deepcopy(model).train()
    with torch.no_grad():
        model.image_encoder.neck.convs[0].conv.weight.mul_(1.1)
    logged: dict[str, Tensor] = {}

    def total(**distill: float) -> float:
        module = VideoTraining(model, TrainRecipe(distill=distill), max_steps=1, teacher=teacher)
        module.log_dict = logged.update  # type: ignore[method-assign]
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.train()._seed_step(0)
        return float(module._loss(batch))

    alone = total(image_embeddings=0)
    for name, weight in (("mask_logits", 1e6), ("image_embeddings", 100.0), ("memory_features", 1e4)):
        added = total(**{name: weight}) - alone
        assert added == pytest.approx(weight * float(logged[f"loss/distill_{name}"]), rel=0.01) and added > 0


def test_a_teacher_answers_the_same_twice_whatever_noise_its_student_has(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    noisy = build_sam2("nano", image_size=SIZE_PX, drop_path_rate=0.5)
    noisy.load_state_dict(model.state_dict())
    recipe = TrainRecipe(distill={"mask_logits": 1}, dropout=0.5, drop_path=0.5)
    module = VideoTraining(noisy, recipe, max_steps=1, teacher=copy.deepcopy(noisy))
    fit(module, [batch], tmp_path)  # puts both in training mode
    image = batch.flat_img_batch

    def passes(network: SAM2) -> list[Tensor]:
        return [network.forward_image(image)["backbone_fpn"][-1] for _ in range(2)]

    teacher = module._teacher[0]
    assert teacher.training and torch.equal(*passes(teacher))
    assert torch.equal(passes(teacher)[0], passes(model)[0])
    assert not torch.equal(*passes(module.model)), "the student keeps its stochastic depth"


def test_the_float_copy_of_a_run_has_no_noise(checkpoint: Path, tmp_path: Path) -> None:
    values = small(checkpoint, tmp_path / "run", quantize=W4A4, train={"dropout": 0.5, "drop_path": 0.5})
    recipe = build_recipe(values)
    run = begin(recipe, RunFolder(recipe))
    shares = {module.drop_prob for module in run.model.modules() if isinstance(module, DropPath)}
    assert max(shares) == 0.5
    noise = [m.drop_prob for m in run.teacher.modules() if isinstance(m, DropPath)]
    noise += [m.p for m in run.teacher.modules() if isinstance(m, torch.nn.Dropout)]
    noise += [m.dropout_p for m in run.teacher.modules() if hasattr(m, "dropout_p")]
    assert noise and set(noise) == {0.0}


def test_a_stage_draws_from_its_sources_and_computes_in_its_precision(checkpoint: Path, tmp_path: Path) -> None:
    stages = [{"sources": "moving_objects:2:val", "precision": "bf16-mixed"}, {}]
    data = {"train": ["moving_objects:8:train", "moving_objects:2:val"], "weights": [1.0, 3.0]}
    values = small(checkpoint, tmp_path / "run", data=data, train={**TRAIN_FLOAT, "stages": stages})
    recipe = build_recipe(merge(values, {"trainer": {"max_steps": 1, "precision": "32-true"}}))
    noted: list[tuple[str, list[tuple[int, float]], set[torch.dtype]]] = []

    class Note(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: VideoTraining, batch: Any, index: int) -> None:
            sources = [(len(each.videos), each.weight) for each in trainer.train_dataloader.dataset._sources]
            noted.append((trainer.precision, sources, dtypes := set()))
            layer = module.model.image_encoder.trunk.blocks[0].attn.qkv
            layer.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))

    train(begin(recipe, RunFolder(recipe)), [Note()])
    first, second = noted
    assert first == ("bf16-mixed", [(2, 3.0)], {torch.bfloat16, torch.float32})
    assert second == ("32-true", [(8, 1.0), (2, 3.0)], {torch.float32})


def test_the_average_is_of_parameters_and_frozen_ones_and_buffers_are_taken_as_they_are(
    model: SAM2, batch: BatchedVideoDatapoint, tmp_path: Path
) -> None:
    model.register_buffer("zero_point", torch.full((3,), 7.0))
    model.register_buffer("statistic", torch.zeros(()))
    before = {name: value.clone() for name, value in model.named_parameters()}
    seen: dict[str, list[Tensor]] = {name: [] for name in before}

    class Note(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            model.statistic += 1
            for name, value in model.named_parameters():
                seen[name].append(value.detach().clone())

    module = VideoTraining(model, TrainRecipe(lr=1e-3, image_encoder_lr=0), max_steps=3)
    fit(module, [batch] * 3, tmp_path, callbacks=[Note(), WeightAverage(0.9)])
    assert torch.equal(model.zero_point, torch.full((3,), 7.0)) and model.statistic == 3
    for name, value in model.named_parameters():
        if name.startswith("image_encoder."):
            assert torch.equal(value, before[name]), name
        first, second, third = seen[name]  # an average starts with the first step's weights
        torch.testing.assert_close(value, 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third)


@pytest.mark.parametrize("broken", ["parameter", "statistic", "nothing"])
def test_a_training_whose_last_step_diverges_says_to_lower_the_rate(model: SAM2, message: Message, broken: str) -> None:
    if broken == "parameter":
        with torch.no_grad():
            model.memory_encoder.out_proj.weight[0] = float("inf")
            model.memory_encoder.out_proj.bias[0] = float("nan")
    if broken == "statistic":
        model.register_buffer("std", torch.tensor(float("nan")))
    if broken == "nothing":
        check_finite(model, TrainRecipe())
        return
    with pytest.raises(UserError) as error:
        check_finite(model, TrainRecipe(lr=10.0))
    assert "lower train.lr=10" in message(error)


def test_prompts_are_metas_or_of_these_shares(meta: DictConfig, model: SAM2) -> None:
    for name in DRAWN:
        setattr(model, name, None)
    set_prompts(model, PromptRecipe())
    assert {name: getattr(model, name) for name in DRAWN} == {name: meta.model[name] for name in DRAWN}
    for point, box in ((0.0, 0.0), (0.3, 0.1), (0.0, 1.0)):
        set_prompts(model, PromptRecipe(point=point, box=box))
        clicked, boxed = model.prob_to_use_pt_input_for_train, model.prob_to_use_box_input_for_train
        assert (clicked * (1 - boxed), clicked * boxed) == pytest.approx((point, box))


def test_dropout_of_layers_and_attentions(model: SAM2) -> None:
    set_dropout(model, 0.25)
    layers = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    attentions = [module.dropout_p for module in model.modules() if hasattr(module, "dropout_p")]
    assert layers and attentions and set(layers + attentions) == {0.25}


def test_calibration_sees_the_same_prompts_again(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    runs = {}
    for points in (False, True):
        first, second = (prompted_forward(model, batch, points=points) for _ in range(2))
        for ours, again in zip(first, second, strict=True):
            assert torch.equal(ours["pred_masks"], again["pred_masks"])
        runs[points] = [frame["multistep_point_inputs"] for frame in first]
    assert all(step is None for frame in runs[False] for step in frame)
    assert [len(frame) for frame in runs[True]] == [2, 1, 1]  # a click and its correction, then tracking
    assert runs[True][0][1]["point_coords"].shape[1] == 2


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
    kinds, steps = [], 400
    for step in range(steps):
        module._seed_step(step)
        inputs = model.prepare_prompt_inputs({}, batch)
        if inputs["use_pt_input"]:
            kinds.append("box" if 2 in inputs["point_inputs_per_frame"][0]["point_labels"] else "point")
    deviation = (0.3 * 0.7 / steps) ** 0.5
    for kind in ("point", "box"):
        assert kinds.count(kind) / steps == pytest.approx(0.3, abs=4 * deviation)


def test_a_step_is_random_by_seed_and_index_alone(model: SAM2, batch: BatchedVideoDatapoint) -> None:
    def draw(seed: int, step: int) -> tuple[float, float]:
        VideoTraining(model, TrainRecipe(), seed=seed)._seed_step(step)
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
    with pytest.raises(UserError, match=r"^training has diverged, the loss is nan at step 0: lower train.lr=5e-06, "):
        fit(module, [batch], tmp_path)


def test_statistics_are_frozen_from_a_step_on() -> None:
    quantizer = torch.nn.Dropout()
    freeze = FreezeStatistics({"q": quantizer}, 2)  # type: ignore[dict-item]
    modes = []
    for step in range(3):
        freeze.on_train_batch_start(SimpleNamespace(global_step=step), None, None, step)  # type: ignore[arg-type]
        modes.append(quantizer.training)
    assert modes == [True, True, False]


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt.1.tmp").touch()
    SafeCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_holds_more_than_tensors_is_not_read(tmp_path: Path) -> None:
    torch.save({"stages": SimpleNamespace()}, tmp_path / "last.ckpt")  # what is pickled could run anything
    with pytest.raises(pickle.UnpicklingError):
        SafeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("given", "gpus", "strategy"),
    [
        ({}, 0, "auto"),
        ({}, 1, "auto"),
        ({}, 4, DDP),
        ({"accelerator": "cpu"}, 4, "auto"),
        ({"devices": 1}, 4, "auto"),
        ({"devices": 2, "accelerator": "cpu"}, 0, DDP),
        ({"num_nodes": 2}, 1, DDP),
        ({"devices": 2, "strategy": "fsdp"}, 4, "fsdp"),
    ],
)
def test_several_devices_get_ddp_that_allows_unused_parameters(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], gpus: int, strategy: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert choose_strategy(TrainerRecipe.model_validate(given)) == strategy
