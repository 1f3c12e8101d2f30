"""Which parts of SAM2 are fitted together, in which order, to which inputs and targets, and every message."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_calibration import converted_nano
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.convert import quantized_weights
from qsam2.layers.hooks import nested_tensors
from qsam2.recipe import build_recipe
from qsam2.recipe.calibrate import ReconstructRecipe
from qsam2.reconstruction.blocks import Call, capture, find_blocks, output_tensors

W4A4 = {"weights": {"method": "minmax", "bits": 4}, "activations": {"method": "minmax", "bits": 4}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted_nano()


def groups(model: nn.Module, **values: Any) -> list[list[str]]:
    return [list(group.blocks) for group in find_blocks(model, ReconstructRecipe(**values))]


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_every_quantized_weight_is_in_one_block(model: nn.Module, method: str) -> None:
    blocks = [item for group in find_blocks(model, ReconstructRecipe(method=method)) for item in group.blocks.items()]
    layers = [layer for _, block in blocks for _, layer, _ in quantized_weights(block)]
    assert len({id(layer) for layer in layers}) == len(layers) == len(list(quantized_weights(model)))
    assert all(model.get_submodule(name) is block for name, block in blocks)
    assert (len(blocks) == len(layers)) == (method == "adaround")


def test_order_groups_and_scales(model: nn.Module) -> None:
    found = groups(model, method="brecq")
    trunk = "image_encoder.trunk"
    assert found[:2] == [[f"{trunk}.patch_embed"], [f"{trunk}.blocks.0"]]
    assert found[10:13] == [
        ["image_encoder.neck"],
        ["sam_mask_decoder.conv_s0", "sam_mask_decoder.conv_s1"],
        ["memory_encoder"],
    ]
    assert found[14:17] == [["memory_attention.layers.0"], ["memory_attention.layers.1"], ["mask_downsample"]]
    assert [len(group) for group in found] == [1] * 11 + [2] + [1] * 13 + [6, 1]
    assert found[-1] == ["obj_ptr_proj"]
    scale = {name: group.scale for group in find_blocks(model, ReconstructRecipe()) for name in group.blocks}
    assert scale["image_encoder.neck"] == scale["sam_mask_decoder.conv_s1"] == "frame"
    assert scale["memory_encoder"] == scale["memory_attention.layers.0"] == "short"
    assert scale["sam_mask_decoder.transformer.layers.0"] == scale["obj_ptr_proj"] == "long"


def test_patterns_choose_blocks_and_adaround_captures_the_layers_of_one_together(model: nn.Module) -> None:
    assert groups(model, blocks="memory_attention.*") == [["memory_attention.layers.0"], ["memory_attention.layers.1"]]
    assert groups(model, blocks=["obj_ptr_proj", "memory_encoder"]) == [["memory_encoder"], ["obj_ptr_proj"]]
    block = "image_encoder.trunk.blocks.1"
    layers = ["attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1", "proj"]
    assert groups(model, method="adaround", blocks=[block]) == [[f"{block}.{layer}" for layer in layers]]


def test_a_pattern_without_a_quantized_block_is_refused(model: nn.Module) -> None:
    message = r"reconstruct.blocks: 'memory_atention.\*' matches no block; nearest names: memory_attention.layers.\d"
    with pytest.raises(UserError, match=message):
        groups(model, blocks=["memory_atention.*"])
    partly_float = converted_nano(rules=[{"match": "memory_attention.*", "keep_float": True}])
    assert not [name for group in groups(partly_float) for name in group if name.startswith("memory_attention")]
    message = r"'memory_attention.\*' matches only blocks whose weights the recipe keeps in float: remove it"
    with pytest.raises(UserError, match=message):
        groups(partly_float, blocks=["memory_attention.*"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing quantized": ({}, r"reconstruct.method=qdrop fits the rounding of weights: give quantize.weights"),
    "float weights": (
        {"quantize": {"activations": W4A4["activations"]}},
        r"reconstruct.method=qdrop fits the rounding of weights",
    ),
    "float activations": (
        {"quantize": {"weights": W4A4["weights"]}},
        r"reconstruct.method=qdrop drops the quantization of activations, but these are in float: .* method=brecq",
    ),
    "training": (
        {"quantize": W4A4, "train": {}},
        r"reconstruct.method=qdrop ends at integers that training cannot move from: give method=block_ap, train=null",
    ),
    "steps of video of weights that train": (
        {"quantize": W4A4, "reconstruct": {"method": "block_ap", "video": {}}},
        r"method=block_ap leaves weights that can be trained.* give video.iterations=0",
    ),
    "no iterations": ({"quantize": W4A4, "reconstruct": {"iterations": 0}}, r"reconstruct.iterations=0"),
    "unknown method": ({"quantize": W4A4, "reconstruct": {"method": "brecqq"}}, r"reconstruct.method='?brecqq"),
    "drops everything": ({"quantize": W4A4, "reconstruct": {"drop": 1}}, r"reconstruct.drop=1"),
    "all warm-up": ({"quantize": W4A4, "reconstruct": {"warmup": 1}}, r"reconstruct.warmup=1"),
    "no scale": (
        {"quantize": W4A4, "reconstruct": {"video": {"frame": 0, "short": 0, "long": 0}}},
        r"frame, short and long are all 0: give at least one of them a weight, or video=null",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD.keys())
def test_bad_recipes_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_recipe({"reconstruct": {}, **values})
    assert "\n" not in str(error.value)


def test_weights_alone_can_be_reconstructed_and_the_fast_preset_shortens_it_but_adds_none() -> None:
    def reconstruct(values: dict[str, Any], *overrides: str) -> ReconstructRecipe | None:
        return build_recipe(values, overrides).reconstruct

    assert reconstruct({"quantize": {"weights": W4A4["weights"]}, "reconstruct": {"method": "brecq"}}).iterations > 0
    assert reconstruct({"debug": "fast"}) is None
    found = reconstruct({"debug": "fast", "quantize": W4A4}, "reconstruct.method=brecq")
    assert (found.iterations, found.video) == (2, None)
    video = reconstruct({"debug": "fast", "quantize": W4A4, "reconstruct": {"video": {"long": 0}}}).video
    assert (video.iterations, video.long) == (2, 0)


# What they are fitted to


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
    for name, before in (("second", [nn.Identity()] * 2), ("last", [m.second for m in models])):
        for call, x in zip(take(models, name, samples), samples, strict=True):
            given, wanted = (after(network.first(x)) for after, network in zip(before, models, strict=True))
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


def test_a_block_that_is_not_reached_or_not_finite_is_named(models: tuple[Stack, Stack]) -> None:
    with pytest.raises(UserError, match="calibration samples did not reach second: give more clips, or leave it out"):
        take(models, "second", [])
    for value in (float("nan"), float("inf")):
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
