"""What a block is fitted to: inputs of the quantized model, outputs of the float one, in bounded memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.hooks import nested_tensors
from qsam2.reconstruction.capture import Call, capture, output_tensors


class Stack(nn.Module):
    """Counts how often its layers run; the last output is changed in place, as SAM2 does with memory features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        second = self.second(self.first(x))
        self.runs += 1
        return self.last(second).mul_(0)


@pytest.fixture
def models() -> tuple[Stack, Stack]:
    torch.manual_seed(0)
    teacher = Stack()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.first.weight.mul_(2)
    return model, teacher


def take(models: tuple[Stack, Stack], name: str, samples: list[Tensor], budget: float = 1e9, one: bool = False):
    model, teacher = models
    blocks, twins = {name: model.get_submodule(name)}, {name: teacher.get_submodule(name)}
    run = lambda quantized, x: (model if quantized else teacher)(x)  # noqa: E731
    return capture(blocks, twins, run, samples, budget_bytes=budget, one_call=one)[name]


def test_inputs_are_quantized_targets_are_float(models: tuple[Stack, Stack]) -> None:
    model, teacher = models
    samples = [torch.randn(3, 2) for _ in range(4)]
    for name, before in (("second", "first"), ("last", None)):
        calls = take(models, name, samples)
        for call, x in zip(calls, samples, strict=True):
            given, wanted = (m.first(x) for m in (model, teacher))
            if before is None:
                given, wanted = model.second(given), teacher.second(wanted)
            assert torch.equal(call.args[0], given) and call.kwargs == {}
            assert torch.equal(call.targets[0], teacher.get_submodule(name)(wanted))
    assert not model.second._forward_hooks and not teacher.second._forward_hooks


def test_with_one_call_the_rest_is_skipped(models: tuple[Stack, Stack]) -> None:
    samples = [torch.randn(3, 2)] * 3
    assert len(take(models, "second", samples, one=True)) == 3
    assert [model.runs for model in models] == [0, 0]


@pytest.mark.parametrize(("kept", "count"), [(100, 10), (5, 10), (4, 10), (1, 10), (3, 9), (0.5, 5)])
def test_memory_is_bounded_by_keeping_every_nth_call(models: tuple[Stack, Stack], kept: float, count: int) -> None:
    samples = [torch.full((4, 2), float(i)) for i in range(count)]
    call_bytes = 4 * 2 * 4
    calls = take(models, "first", samples, budget=2 * kept * call_bytes)
    values = [float(call.args[0][0, 0]) for call in calls]
    stride = 1
    while -(-count // stride) > max(kept, 1):
        stride *= 2
    assert values == list(range(0, count, stride))
    for call in calls:
        assert torch.equal(call.targets[0], models[1].first(call.args[0]))


def test_targets_larger_than_inputs_thin_both() -> None:
    model = nn.Sequential(nn.Linear(2, 64))
    run = lambda _, x: model(x)  # noqa: E731
    samples = [torch.full((1, 2), float(i)) for i in range(8)]
    budget = 2 * 2 * 64 * 4  # room for two targets, and for many inputs
    calls = capture({"0": model[0]}, {"0": model[0]}, run, samples, budget_bytes=budget, one_call=False)["0"]
    assert [float(call.args[0][0, 0]) for call in calls] == [0.0, 4.0]
    assert torch.equal(calls[1].targets[0], model(samples[4]))


def test_a_block_that_nothing_reaches_is_named(models: tuple[Stack, Stack]) -> None:
    with pytest.raises(UserError, match="calibration samples did not reach second: give more clips, or leave it out"):
        take(models, "second", [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(models: tuple[Stack, Stack], value: float) -> None:
    with pytest.raises(UserError, match="inputs or float outputs of second contain NaN or infinity"):
        take(models, "second", [torch.full((1, 2), value)])


def test_models_that_take_different_ways_are_refused(models: tuple[Stack, Stack]) -> None:
    model, teacher = models

    def run(quantized: bool, x: Tensor) -> None:
        for _ in range(1 + quantized):
            (model if quantized else teacher)(x)

    with pytest.raises(RuntimeError, match="second was called 2 times, in the float model 1 times"):
        pair = {"second": model.second}, {"second": teacher.second}
        capture(*pair, run, [torch.ones(1, 2)], budget_bytes=9, one_call=False)


def test_outputs_are_all_tensors_but_position_encodings() -> None:
    a, b, position = (torch.zeros(1) + i for i in range(3))
    assert output_tensors(a) == (a,)
    assert output_tensors((a, b)) == (a, b)
    assert output_tensors(([a, b], [position, position])) == (a, b)
    assert output_tensors({"vision_features": a, "vision_pos_enc": [position]}) == (a,)
    assert list(nested_tensors(Call((a, [b]), {"k": {"x": a}, "n": 3}, (b,)))) == [a, b, a, b]
