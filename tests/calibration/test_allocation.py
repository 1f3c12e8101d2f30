"""Bits under a budget: the optimum against all combinations, importance against NumPy, costs from measurements."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qsam2.calibration.allocation import (
    allocatable,
    allocate,
    allocate_bits,
    group_of,
    importance,
    measured_costs,
    solve,
)
from qsam2.errors import UserError
from qsam2.models import build_sam2
from qsam2.recipe import build_recipe
from qsam2.recipe.quantize import QuantizeRecipe

CHOICES = (2, 3, 4, 6)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.lists(st.floats(0, 10), min_size=4, max_size=4)), min_size=1, max_size=4),
    st.floats(2, 6),
)
def test_no_combination_in_the_budget_costs_less(layers: list[tuple[int, list[float]]], average: float) -> None:
    sizes = {str(index): size for index, (size, _) in enumerate(layers)}
    costs = {str(index): dict(zip(CHOICES, cost, strict=True)) for index, (_, cost) in enumerate(layers)}
    chosen = solve(costs, sizes, average)
    budget = average * sum(sizes.values()) + 1e-6

    def used(bits: dict[str, int]) -> float:
        return sum(sizes[name] * each for name, each in bits.items())

    def cost(bits: dict[str, int]) -> float:
        return sum(costs[name][each] for name, each in bits.items())

    everything = (dict(zip(sizes, each, strict=True)) for each in itertools.product(CHOICES, repeat=len(sizes)))
    best = min(cost(bits) for bits in everything if used(bits) <= budget)
    assert used(chosen) <= budget
    assert cost(chosen) == pytest.approx(best, abs=1e-5)


def test_the_important_layer_gets_the_bits() -> None:
    layers: dict[str, nn.Module] = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    costs = {name: {bits: value * 2.0**-bits for bits in (2, 4, 6)} for name, value in {"a": 100.0, "b": 1.0}.items()}
    bits, average = allocate(layers, costs, 4.0)
    assert bits == {"a": 6, "b": 2} and average == 4.0
    recipe = build_recipe({"quantize": {"weights": {"method": "minmax", "bits": 4}, "allocate": {}}})
    folder = SimpleNamespace(metrics={"allocated_bits": {"layers": bits}})
    run: Any = SimpleNamespace(recipe=recipe, folder=folder, model=nn.ModuleDict(layers))
    allocate_bits(run)
    assert run.recipe.quantize.allocate is None
    rules = [(rule.match, rule.weight_bits, rule.activation_bits) for rule in run.recipe.quantize.rules]
    assert rules == [("a", 6, None), ("b", 2, None)]


def test_layers_of_a_group_share_its_bits() -> None:
    names = [f"memory_attention.layers.{index}.linear{part}" for index in (0, 1) for part in (1, 2)]
    layers: dict[str, nn.Module] = {name: nn.Linear(4, 4) for name in names}
    costs = {"memory_attention.layers.0": {2: 9.0, 6: 0.0}, "memory_attention.layers.1": {2: 1.0, 6: 0.0}}
    assert list(allocate(layers, costs, 4.0)[0].values()) == [6, 6, 2, 2]


@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: nn.Linear(5, 3), (2, 7, 5)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 5, 5)),
    ],
    ids=["linear", "conv", "depthwise", "grouped", "transposed"],
)
def test_importance_is_that_of_its_equation(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = build()
    batches = [torch.randn(shape) for _ in range(3)]
    found = importance({"layer": layer}, layer, batches)["layer"]

    x = np.stack([np.moveaxis(batch.numpy(), -1 if len(shape) == 3 else 1, -1) for batch in batches])
    norms = np.sqrt((x.reshape(-1, x.shape[-1]).astype(float) ** 2).sum(axis=0))
    weight = np.abs(layer.weight.detach().numpy().astype(float))
    groups = getattr(layer, "groups", 1)
    channel = np.arange(len(weight))[:, None]
    if not isinstance(layer, nn.ConvTranspose2d):  # an output's inputs are those of its group
        channel = channel // (len(weight) // groups) * weight.shape[1] + np.arange(weight.shape[1])
    expected = (weight.reshape(*weight.shape[:2], -1) * norms[channel][..., None]).mean()
    assert found == pytest.approx(expected, rel=1e-6)  # squares are of single precision


def test_groups_are_the_parts_of_sam2() -> None:
    quantize = QuantizeRecipe.model_validate({"weights": {"method": "minmax", "bits": 4}})
    names = allocatable(build_sam2("nano"), quantize)
    blocks = [f"image_encoder.trunk.blocks.{index}" for index in range(9)]
    attention = [f"memory_attention.layers.{index}" for index in range(2)]
    decoder = ["sam_prompt_encoder", "sam_mask_decoder.transformer", "sam_mask_decoder"]
    expected = [*blocks, "image_encoder.neck", *attention, "memory_encoder", *decoder, "obj_ptr_proj"]
    assert list(dict.fromkeys(group_of(name) for name in names)) == [*expected, "obj_ptr_tpos_proj"]
    assert not any(quantize.rule_for(name) for name in names)


def write(folder: Path, losses: dict[int, float]) -> Path:
    """A measurement of the group g."""
    rows = [{"group": "g", "part": "weights", "bits": bits, "loss": loss} for bits, loss in losses.items()]
    rows.append({"group": "g", "part": "activations", "bits": 4, "loss": 99.0})
    file = folder / "sensitivity.json"
    file.write_text(json.dumps({"groups": rows}))
    return file


def test_costs_between_and_beyond_what_was_measured_never_rise(tmp_path: Path) -> None:
    costs = measured_costs(write(tmp_path, {3: 8.0, 5: 2.0}), ["g.a", "g.b"], (2, 3, 4, 5, 6, 8))
    assert costs == {"g": pytest.approx({2: 32.0, 3: 8.0, 4: 4.0, 5: 2.0, 6: 0.5, 8: 0.03125})}
    noisy = list(measured_costs(write(tmp_path, {2: 1.0, 4: 3.0, 6: -1.0}), ["g.a"], (2, 4, 6))["g"].values())
    assert noisy == sorted(noisy, reverse=True) and noisy[0] == pytest.approx(3.0) and noisy[-1] > 0


NONSENSE = (
    '{"groups": [{"group": "g", "part": "weights", "bits": 4, "loss": NaN}]}',
    '{"groups": [{"group": "g", "part": "weights", "bits": 4, "loss": true}]}',
    '{"groups": [{"group": "g", "part": "weights", "bits": 4, "loss": 1e400}]}',
    '{"groups": [{"group": "g", "part": "weights", "bits": 1e400, "loss": 1}]}',
    '{"groups": [{"group": "g", "part": "weights", "bits": 4.5, "loss": 1}]}',
    '{"groups": [{"group": "g", "part": "weights", "bits": -4, "loss": 1}]}',
    '{"groups": [{"group": ["g"], "part": "weights", "bits": 4, "loss": 1}]}',
)


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file.*: run qsam2 sensitivity on this"):
        measured_costs(missing, ["g.a"], CHOICES)
    file = write(tmp_path, {4: 1.0})
    with pytest.raises(UserError, match=r"sensitivity\.json lacks h: run qsam2 sensitivity"):
        measured_costs(file, ["g.a", "h.a"], CHOICES)
    for text in ("[]", "{", '{"groups": [{"group": "g"}]}', '{"groups": 3}', "[" * 5000, *NONSENSE):
        file.write_text(text)
        with pytest.raises(UserError, match="is not the result of a sensitivity measurement"):
            measured_costs(file, ["g.a"], CHOICES)


def test_a_budget_below_all_choices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"average_bits=2 is below the least of choices, 3: raise one or lower"):
        QuantizeRecipe.model_validate(
            {"weights": {"method": "minmax", "bits": 4}, "allocate": {"average_bits": 2, "choices": [3]}}
        )
    with pytest.raises(ValueError, match="allocate distributes the bits of weights, but weights is null"):
        QuantizeRecipe.model_validate({"activations": {"method": "minmax", "bits": 4}, "allocate": {}})
