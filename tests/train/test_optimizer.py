"""Learning rate and weight decay, by parameter name, against Meta's own optimizer."""

from __future__ import annotations

import pytest
import torch
from omegaconf import DictConfig
from training.optimizer import construct_optimizer

from qsam2.layers.convert import convert, quantizers
from qsam2.models import SAM2, build_sam2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import LSCSpec, LSQSpec
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.recipe.train import TrainRecipe
from qsam2.train.optimizer import cosine_share, parameter_groups
from qsam2.train.video_training import VideoTraining

STEPS = 8

Options = dict[str, tuple[float, float]]
"""(learning rate, weight decay) by parameter name."""


def options(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Options:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("size", ["nano", "tiny", "base_plus"])
def test_rates_and_decay_of_all_parameters_are_metas(size: str, meta: DictConfig) -> None:
    model = build_sam2(size, image_size=64)
    theirs = construct_optimizer(model, meta.optim.optimizer, meta.optim.options, meta.optim.param_group_modifiers)
    module = VideoTraining(model, TrainRecipe(), max_steps=STEPS)
    configured = module.configure_optimizers()
    ours, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert meta.optim.optimizer._target_ == "torch.optim.AdamW" and type(ours) is torch.optim.AdamW
    for step in range(STEPS + 1):
        theirs.step_schedulers(min(step / STEPS, 1 - 1e-9), step)  # fvcore wants less than 1
        expected, given = options(model, theirs.optimizer), options(model, ours)
        assert given.keys() == expected.keys() == dict(model.named_parameters()).keys()
        for name, (lr, decay) in expected.items():
            assert given[name] == (pytest.approx(lr, rel=1e-12), decay), (name, step)
        ours.step()
        schedule.step()
    assert len({lr for lr, _ in expected.values()}) > 4  # the layer decay does something


def test_clipping_is_metas(meta: DictConfig) -> None:
    assert TrainerRecipe().gradient_clip == meta.optim.gradient_clip.max_norm


@pytest.mark.parametrize("spec", [LSCSpec(bits=4), LSQSpec(bits=4)])
def test_quantizers_have_groups_of_their_own(spec: LSCSpec | LSQSpec, model: SAM2) -> None:
    recipe = TrainRecipe(quantizer_lr=0.5, weight_decay=0.3)
    before = options(model, torch.optim.AdamW(parameter_groups(model, recipe)))
    convert(model, QuantizeRecipe(weights=spec, activations=spec))
    learned = {f"{name}.{key}" for name, q in quantizers(model) for key, _ in q.named_parameters()}
    assert learned
    groups = parameter_groups(model, recipe, learned)
    after = options(model, torch.optim.AdamW(groups))
    assert after.keys() == before.keys() | learned
    assert all(after[name] == (0.5, 0.0) for name in learned)
    assert {name: after[name] for name in before} == before
    by_role = {role: {n for g in groups if g["role"] == role for n in g["names"]} for role in ("weights", "quantizers")}
    assert by_role == {"weights": set(before), "quantizers": learned}


def test_frozen_parameters_are_left_out(model: SAM2) -> None:
    model.image_encoder.requires_grad_(False)
    names = {name for group in parameter_groups(model, TrainRecipe()) for name in group["names"]}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("image_encoder.")}


def test_warm_up_rises_to_the_cosine() -> None:
    shares = [cosine_share(step, max_steps=100, end=0.0, warmup_steps=4) for step in range(101)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later <= earlier for earlier, later in zip(shares[3:], shares[4:], strict=False))
    assert shares[100] == pytest.approx(0.0)
    assert cosine_share(150, max_steps=100, end=0.1) == pytest.approx(0.1)  # beyond the end it stays


def test_a_learned_clip_with_a_tiny_gradient_moves_as_fast_as_the_others():
    model = torch.nn.Module()
    model.clips = torch.nn.Parameter(torch.zeros(2))
    recipe = TrainRecipe(quantizer_lr=1e-3)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe, ["clips"]))
    for _ in range(10):
        model.clips.grad = torch.tensor([1e-2, 1e-10])
        optimizer.step()
    torch.testing.assert_close(model.clips.detach(), torch.full((2,), -1e-2), rtol=1e-3, atol=0)
