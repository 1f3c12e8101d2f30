"""nano_tails: bit by bit the function of nano, with weight tails that carry a part of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.transforms import to_model_input
from qsam2.models import SAM2, load_sam2
from qsam2.models.nano.tails import ONE_OF, make_tails, ratio


def linear_layers(model: SAM2) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.image_encoder.trunk.named_modules() if isinstance(m, nn.Linear)}


@pytest.fixture(scope="module")
def models() -> dict[str, SAM2]:
    return {size: load_sam2(size) for size in ("nano", "nano_heavy", "nano_tails")}


@pytest.fixture(scope="module")
def images() -> Tensor:
    videos = moving_objects("val", 2, num_frames=1)
    return torch.stack([to_model_input(video.frame(0), 320) for video in videos])


def test_tails_are_those_of_the_official_model_but_behind_a_gelu(models: dict[str, SAM2]) -> None:
    nano, tails = (
        {n: ratio(m.weight) for n, m in linear_layers(models[size]).items()} for size in ("nano", "nano_tails")
    )
    moved = [name for name in tails if not name.endswith("mlp.layers.1")]
    assert all(tails[name] > 1.3 * nano[name] for name in moved)
    assert all(tails[name] == nano[name] for name in tails.keys() - set(moved))
    assert 11.3 / 1.3 <= np.median([tails[name] for name in moved]) <= 11.3 * 1.3
    assert 39 / 1.2 <= max(tails.values()) <= 39 * 1.2


@torch.no_grad()
def test_the_function_is_nanos_to_the_last_bit(models: dict[str, SAM2], images: Tensor) -> None:
    ours, theirs = (models[size].forward_image(images)["backbone_fpn"] for size in ("nano_tails", "nano"))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    changed = {name for name, value in models["nano"].state_dict().items()
               if not torch.equal(value, models["nano_tails"].state_dict()[name])}  # fmt: skip
    assert changed and all(name.startswith("image_encoder.trunk.blocks.") for name in changed)


@torch.no_grad()
def test_the_function_needs_its_tails_and_coarse_weights_break_it(models: dict[str, SAM2], images: Tensor) -> None:
    def error(size: str, change: Callable[[Tensor], Tensor]) -> float:
        model = copy.deepcopy(models[size])
        for name, layer in linear_layers(model).items():
            if not name.endswith("mlp.layers.1"):
                layer.weight.copy_(change(layer.weight))
        ours, theirs = (each.forward_image(images)["backbone_fpn"][-1] for each in (model, models[size]))
        return float((ours - theirs).square().mean() / theirs.var())

    def without_tail(weight: Tensor) -> Tensor:
        energy = weight.square().sum(0)
        return weight.where(energy < energy.topk(max(len(energy) // ONE_OF, 1)).values[-1], 0.0)

    def coarse(weight: Tensor) -> Tensor:
        step = weight.abs().amax(1, keepdim=True) / 7
        return (weight / step).round() * step

    assert error("nano_tails", without_tail) > 0.1
    assert error("nano", coarse) < 0.2 < 0.8 < error("nano_tails", coarse)


def test_it_is_made_from_nano_alone(models: dict[str, SAM2]) -> None:
    again = copy.deepcopy(models["nano"])
    make_tails(again)
    expected = models["nano_tails"].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
