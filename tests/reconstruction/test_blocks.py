"""Which parts of SAM2 are fitted together, in which order, and what the recipe can say about it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from qsam2.errors import UserError
from qsam2.layers.convert import convert, quantized_weights
from qsam2.models import build_sam2
from qsam2.recipe import build_recipe
from qsam2.recipe.calibrate import ReconstructRecipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.reconstruction.blocks import Block, find_blocks

W4A4 = {"weights": {"method": "minmax", "bits": 4}, "activations": {"method": "minmax", "bits": 4}}


def converted(*rules: dict[str, Any]) -> nn.Module:
    model = build_sam2("nano", image_size=64)
    convert(model, QuantizeRecipe.model_validate({**W4A4, "rules": rules}))
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted()


def groups(model: nn.Module, **values: Any) -> list[list[str]]:
    return [[block.name for block in group] for group in find_blocks(model, ReconstructRecipe(**values))]


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_every_quantized_weight_is_in_one_block(model: nn.Module, method: str) -> None:
    blocks = [block for group in find_blocks(model, ReconstructRecipe(method=method)) for block in group]
    layers = [layer for block in blocks for _, layer, _ in quantized_weights(block.module)]
    assert len({id(layer) for layer in layers}) == len(layers) == len(list(quantized_weights(model)))
    assert all(model.get_submodule(block.name) is block.module for block in blocks)
    assert (len(blocks) == len(layers)) == (method == "adaround")


def test_order_and_groups(model: nn.Module) -> None:
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


def test_scales(model: nn.Module) -> None:
    blocks: list[Block] = [block for group in find_blocks(model, ReconstructRecipe()) for block in group]
    scale = {block.name: block.scale for block in blocks}
    assert scale["image_encoder.neck"] == scale["sam_mask_decoder.conv_s1"] == "frame"
    assert scale["memory_encoder"] == scale["memory_attention.layers.0"] == "short"
    assert scale["sam_mask_decoder.transformer.layers.0"] == scale["obj_ptr_proj"] == "long"
    for group in find_blocks(model, ReconstructRecipe(method="adaround")):
        assert len({block.scale for block in group}) == 1


def test_adaround_captures_the_layers_of_a_block_together(model: nn.Module) -> None:
    block = "image_encoder.trunk.blocks.1"
    found = groups(model, method="adaround", blocks=[block])
    layers = ["attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1", "proj"]
    assert found == [[f"{block}.{layer}" for layer in layers]]


def test_patterns_choose_blocks(model: nn.Module) -> None:
    assert groups(model, blocks="memory_attention.*") == [["memory_attention.layers.0"], ["memory_attention.layers.1"]]
    assert groups(model, blocks=["obj_ptr_proj", "memory_encoder"]) == [["memory_encoder"], ["obj_ptr_proj"]]


def test_a_pattern_without_a_block_names_the_nearest(model: nn.Module) -> None:
    message = r"reconstruct.blocks: 'memory_atention.\*' matches no block; nearest names: memory_attention.layers.\d"
    with pytest.raises(UserError, match=message):
        groups(model, blocks=["memory_atention.*"])


def test_what_is_kept_in_float_cannot_be_reconstructed() -> None:
    model = converted({"match": "memory_attention.*", "keep_float": True})
    assert not [name for group in groups(model) for name in group if name.startswith("memory_attention")]
    message = r"'memory_attention.\*' matches only blocks whose weights the recipe keeps in float: remove it"
    with pytest.raises(UserError, match=message):
        groups(model, blocks=["memory_attention.*"])


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
    "training": ({"quantize": W4A4, "train": {}}, r"is for calibration alone, training moves the weights again"),
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


def test_reconstruction_of_weights_alone_is_possible() -> None:
    recipe = build_recipe({"quantize": {"weights": W4A4["weights"]}, "reconstruct": {"method": "brecq"}})
    assert recipe.reconstruct is not None and recipe.reconstruct.iterations > 0


def test_the_fast_preset_shortens_reconstruction_but_adds_none() -> None:
    assert build_recipe({"debug": "fast"}).reconstruct is None
    recipe = build_recipe({"debug": "fast", "quantize": W4A4}, ["reconstruct.method=brecq"])
    assert recipe.reconstruct is not None and recipe.reconstruct.iterations == 2 and recipe.reconstruct.video is None
    video = build_recipe({"debug": "fast", "quantize": W4A4, "reconstruct": {"video": {"long": 0}}}).reconstruct
    assert video is not None and video.video is not None and (video.video.iterations, video.video.long) == (2, 0)
