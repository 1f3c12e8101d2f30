"""Watched layers: which calls are recorded, in which half, and every message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qsam2.errors import UserError
from qsam2.layers.hooks import gather_halves, hooked, watch_inputs


@pytest.fixture
def layers() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})


@pytest.mark.parametrize("before", [True, False])
def test_calls_are_recorded_and_hooks_removed(layers, before):
    calls: list[tuple[Any, ...]] = []
    x = torch.randn(3, 2)
    with pytest.raises(ZeroDivisionError), hooked(dict(layers), lambda *call: calls.append(call), before=before):
        out = layers["a"](input=x)
        raise ZeroDivisionError
    layers["a"](x)
    ((name, args, kwargs, *output),) = calls
    assert (name, args) == ("a", ()) and kwargs["input"] is x
    assert output == [] if before else output[0] is out


def test_each_half_gets_its_samples(layers):
    inputs, samples = [], list(torch.randn(5, 1, 2))
    both = nn.Sequential(*layers.values())
    gather_halves(dict(layers), lambda *call: inputs.append(call), both, samples, 5, remedy="")
    halves = ["fit"] * 2 + ["held_out"] * 3
    assert [(half, name) for half, name, _ in inputs] == [(half, name) for half in halves for name in "ab"]
    assert all(torch.equal(x, sample) for (_, _, x), sample in zip(inputs[::2], samples, strict=True))
    assert not any(x.requires_grad for _, _, x in inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_names_the_layer(layers, value):
    with pytest.raises(UserError, match="^NaN or infinity at the input of a: check the sample"):  # noqa: SIM117
        with watch_inputs(dict(layers), lambda *_: None, remedy=""):
            layers["a"](torch.tensor([0.0, value]))
    assert not layers["a"]._forward_pre_hooks


@pytest.mark.parametrize(("available", "count", "needed"), [(3, 8, 8), (0, 8, 8), (1, 1, 2)])
def test_too_few_samples(layers, available, count, needed):
    with pytest.raises(UserError, match=f"^calibration needs {needed} samples, the data gave {available}: give"):
        gather_halves({"a": layers["a"]}, lambda *_: None, layers["a"], [torch.ones(2)] * available, count, remedy="")


@pytest.mark.parametrize("reached", ["aa", "ba", "ab"])
def test_each_half_has_to_reach_every_layer(layers, reached):
    def run(last: str) -> None:
        for name in "ab"[: "ab".index(last) + 1]:
            layers[name](torch.ones(2))

    with pytest.raises(UserError, match="^calibration samples did not reach b: call b$"):
        gather_halves(dict(layers), lambda *_: None, run, reached, 2, remedy="call b")
