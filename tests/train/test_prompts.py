"""Prompts while training against Meta's recipe; those of calibration are always the same."""

from __future__ import annotations

import pytest
import torch
from omegaconf import DictConfig
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.models import SAM2
from qsam2.recipe.recipe import PromptRecipe
from qsam2.train.video_training import prompted_forward, set_dropout, set_prompts

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


def test_prompts_are_metas(meta: DictConfig, model: SAM2) -> None:
    for name in DRAWN:
        setattr(model, name, None)
    set_prompts(model, PromptRecipe())
    assert {name: getattr(model, name) for name in DRAWN} == {name: meta.model[name] for name in DRAWN}


@pytest.mark.parametrize(("point", "box"), [(0.0, 0.0), (0.3, 0.1), (0.0, 1.0)])
def test_shares_of_points_and_boxes(point: float, box: float, model: SAM2) -> None:
    set_prompts(model, PromptRecipe(point=point, box=box))
    clicked, boxed = model.prob_to_use_pt_input_for_train, model.prob_to_use_box_input_for_train
    assert (clicked * (1 - boxed), clicked * boxed) == pytest.approx((point, box))


def test_dropout_of_layers_and_attentions(model: SAM2) -> None:
    set_dropout(model, 0.25)
    layers = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    attentions = [module.dropout_p for module in model.modules() if hasattr(module, "dropout_p")]
    assert layers
    assert attentions
    assert set(layers + attentions) == {0.25}


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
