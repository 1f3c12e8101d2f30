"""Conversion: float layers stay SAM2's own, quantized ones follow the rules, every message."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_sam2 import RUNS, segment_image, track_video, train_forward
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.errors import UserError
from qsam2.layers.attention import QuantizedAttention
from qsam2.layers.convert import convert, quantized_weights, quantizers, set_state, stage_bits
from qsam2.layers.products import exceptions_table, products
from qsam2.layers.weight import QuantConv2d, QuantConvTranspose2d, QuantLinear
from qsam2.models import SAM2, build_sam2
from qsam2.quantizers import QuantizerState
from qsam2.recipe.quantize import DEFAULT_RULES, QuantizeRecipe
from qsam2.recipe.recipe import MemoryRecipe

W4A4: dict[str, Any] = {
    "weights": {"method": "lsq", "bits": 4, "range": "minmax"},
    "activations": {"method": "minmax", "bits": 4},
}


def recipe(*rules: dict[str, Any], **changes: Any) -> QuantizeRecipe:
    return QuantizeRecipe.model_validate({**W4A4, "rules": rules, **changes})


@pytest.fixture(scope="module")
def calibrated(pristine: SAM2) -> SAM2:
    model = copy.deepcopy(pristine)
    convert(model, recipe())
    find_ranges(model, lambda _: track_video(model), [0])
    return model


@pytest.mark.parametrize(
    "run, training", [(segment_image, False), (track_video, False), (train_forward, False), (train_forward, True)]
)
def test_a_model_kept_in_float_is_sam2_bit_for_bit(model, pristine, run, training):
    modules = dict(model.named_modules())
    rows = convert(model, recipe({"match": "*", "keep_float": True}))
    assert dict(model.named_modules()) == modules, "same objects"
    assert all(row.weight_bits is row.activation_bits is None for row in rows)
    assert not list(quantizers(model))
    ours, theirs = run(model.train(training)), run(copy.deepcopy(pristine).train(training))
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_quantizers_in_float_change_nothing_but_rounding_and_calibrated_ones_do(model, calibrated, pristine, run):
    theirs = run(copy.deepcopy(pristine))
    convert(model, recipe())
    for one, other in zip(run(model), theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    differ = [not torch.equal(one, other) for one, other in zip(run(copy.deepcopy(calibrated)), theirs, strict=True)]
    assert sum(differ) >= len(differ) / 2, "a mask that was given is given back"


def test_everything_but_first_and_last_layers_has_the_recipes_bits(model):
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    rows = convert(model, recipe())
    eight = {row.name for row in rows if row.activation_bits == 8}
    assert eight == {
        "image_encoder.trunk.patch_embed.proj",
        "sam_prompt_encoder.mask_downscaling.0",
        "memory_encoder.mask_downsampler.encoder.0",
        "mask_downsample",
        "sam_mask_decoder.output_upscaling.3",
        *(f"sam_mask_decoder.output_hypernetworks_mlps.{index}.layers.2" for index in range(4)),
        "sam_mask_decoder.iou_prediction_head.layers.2",
        "sam_mask_decoder.pred_obj_score_head.layers.2",
        "obj_ptr_proj.layers.2",
    }
    for row in rows:
        width = 8 if row.name in eight else 4
        assert (row.weight_bits, row.activation_bits) == (width if row.name in names else None, width), row
    assert {row.name for row in rows if row.weight_bits} == names
    assert sum(row.weight_bits is None for row in rows) == 5 + 2 + 7, "5 blocks, 2 in the memory, 7 in the decoder"


@pytest.mark.parametrize("training", [False, True])
def test_layers_are_twins_that_share_parameters(model, pristine, training):
    parameters = dict(model.named_parameters())
    convert(model.train(training), recipe())
    kinds = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d, nn.ConvTranspose2d: QuantConvTranspose2d}
    assert not [name for name, module in model.named_modules() if type(module) in kinds]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert all(".input_quantizer." in name or ".weight_quantizer." in name for name in now.keys() - parameters.keys())
    for name, quantizer in quantizers(model):
        assert (quantizer.name, quantizer.state, quantizer.training) == (name, QuantizerState.FLOAT, training)
    attentions = sum(isinstance(module, QuantizedAttention) for module in model.modules())
    assert len(list(quantizers(model))) == 2 * len(list(quantized_weights(model))) + 3 * attentions
    for name, layer, quantizer in quantized_weights(model):
        channels = layer.out_features if isinstance(layer, QuantLinear) else layer.out_channels
        assert quantizer.scale.numel() == channels, name
    set_state(model, QuantizerState.OBSERVE)
    assert {quantizer.state for _, quantizer in quantizers(model)} == {QuantizerState.OBSERVE}
    changed = {name: tensor + 1 for name, tensor in pristine.state_dict().items()}
    assert not model.load_state_dict(changed, strict=False).unexpected_keys
    assert torch.equal(model.obj_ptr_tpos_proj.weight, pristine.obj_ptr_tpos_proj.weight + 1)


def test_the_first_rule_wins_and_leaves_out_bits_are_the_recipes(model):
    rules = (
        {"match": "*.blocks.0.*", "weight_bits": 2},
        {"match": "*.blocks.*.qkv", "bits": 6, "activation_bits": 5},
        {"match": "image_encoder.neck.*", "keep_float": True, "reason": "a test"},
        {"match": "mask_downsample", "bits": 3},
    )
    rows = convert(model, recipe(*rules))
    bits = {row.name: (row.weight_bits, row.activation_bits) for row in rows}
    assert bits["image_encoder.trunk.blocks.0.attn.qkv"] == (2, 4)
    assert bits["image_encoder.trunk.blocks.1.attn.qkv"] == (6, 5)
    assert bits["image_encoder.neck.convs.0.conv"] == (None, None)
    assert bits["mask_downsample"] == (3, 3), "before the default rules"
    assert type(model.image_encoder.neck.convs[0].conv) is nn.Conv2d
    assert next(row.reason for row in rows if row.name == "image_encoder.neck.convs.3.conv") == "a test"


@pytest.mark.parametrize("part, other", [("weights", "activations"), ("activations", "weights")])
def test_weights_or_activations_alone(model, part, other):
    rows = convert(model, recipe(**{other: None}))
    assert {quantizer.role for _, quantizer in quantizers(model)} == {part.removesuffix("s")}
    assert all(row.weight_bits is None for row in rows) or all(row.activation_bits is None for row in rows)
    attention = next(row for row in rows if row.kind == "MultiScaleAttention")
    assert (attention.reason == "the recipe leaves activations in float") == (part == "weights")


@pytest.mark.parametrize("version", ["2", "2.1"])
def test_every_default_rule_but_one_a_version_finds_its_layer(version):
    rows, quantize = convert(build_sam2("tiny", version=version), recipe()), recipe()
    deciding = {rule.match for row in rows if (rule := quantize.rule_for(row.name))}
    unused = {rule.match for rule in DEFAULT_RULES} - deciding
    heads = {"obj_ptr_proj", "sam_mask_decoder.pred_obj_score_head"}
    assert len(unused) == 2 and unused <= heads | {f"{head}.layers.2" for head in heads}


def test_products_with_other_bits_are_told(model):
    rows = convert(model, recipe({"match": "obj_ptr_tpos_proj", "keep_float": True}))
    table = products(rows, MemoryRecipe())
    first, *lines = exceptions_table(table).splitlines()
    others = [line.split()[0] for line in lines[1:]]
    assert first.startswith(f"{len(table) - len(others)} of {len(table)} products have the recipe's bits")
    assert 5 < len(others) < 20 and "obj_ptr_tpos_proj" in others and "image_encoder.trunk.patch_embed.proj" in others
    assert "sam_mask_decoder" in others, "products outside of layers are told, too"
    assert "the others" not in exceptions_table([row for row in table if row.name not in others])


@pytest.mark.parametrize(
    "rules, changes, message",
    [
        (
            ({"match": "mask_downsample", "bits": 8}, {"match": "memory_atention.*", "bits": 8}),
            {},
            r"rules.1: match='memory_atention.\*' matches no layer; nearest names: memory_att",
        ),
        (
            ({"match": "mask_*", "bits": 8}, {"match": "mask_downsample", "bits": 6}),
            {},
            "quantize.rules.1: match='mask_downsample' decides on no layer, earlier rules",
        ),
        (
            (),
            {"activations": {"method": "minmax", "bits": 4, "granularity": "channel"}},
            "quantizer image_encoder.trunk.patch_embed.proj.input_quantizer: granularity=channel",
        ),
    ],
    ids=["no match", "overruled", "no fit"],
)
def test_rules_and_quantizers_that_fit_no_layer_are_refused(model, rules, changes, message):
    with pytest.raises(UserError, match=message):
        convert(model, recipe(*rules, **changes))
    assert not list(quantizers(model)), "nothing is half converted"


def test_a_model_is_converted_once(model):
    convert(model, recipe())
    with pytest.raises(ValueError, match="converted already"):
        convert(model, recipe())


def test_checkpointed_training_gives_the_same_gradients(model):
    convert(model, recipe(activations={"method": "lsq", "bits": 4, "range": "minmax"}))
    find_ranges(model, lambda _: track_video(model), [0])
    gradients = []
    for model.use_act_ckpt_iterative_pt_sampling in (False, True):
        model.zero_grad()
        sum(masks.square().mean() for masks in train_forward(model.train())).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and len(plain) > 200
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("weights", [4, "float", None])
@pytest.mark.parametrize("activations", ["float", None])
def test_a_stage_of_training_has_bits_of_its_own(weights: Any, activations: Any) -> None:
    spec = {"method": "lsc", "bits": 2}
    recipe = QuantizeRecipe.model_validate({"weights": spec, "activations": spec, "rules": [{"match": "0", "bits": 8}]})
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    convert(model, recipe)
    find_ranges(model, model, [torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3)])
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 8)
    with stage_bits(model, recipe, weights=weights, activations=activations):
        layer = model[1]
        levels = [len(layer.quantized_weight()[row].unique()) for row in range(8)]
        most = {4: 8, "float": 8, None: 4}[weights]  # of eight values per row
        assert max(levels) <= most and (weights is None or max(levels) > 4)
        bits = [quantizer.bits for _, _, quantizer in quantized_weights(model)]
        assert bits == [8, 4 if weights == 4 else 2]
        assert torch.equal(layer.quantized_input(x), x) == (activations == "float")
        assert weights != 4 or model.state_dict().keys() == before.keys()  # a checkpoint of the stage fits
        with torch.no_grad():
            layer.weight.mul_(3.0)
    own = [quantizer for _, quantizer in quantizers(model)]
    assert {q.state for q in own} == {QuantizerState.QUANTIZE} and {q.bits for q in own} == {8, 2}
    assert not torch.equal(model[1].quantized_input(x), x)
    scale, first = model[1].weight_quantizer.scale, before["1.weight_quantizer.std"]
    grown = float((model[1].weight_quantizer.std / first).mean())
    assert grown == pytest.approx(3.0 if weights else 1.0, rel=1e-5) and (scale > 0).all()
    assert torch.equal(model[0].weight_quantizer.log_alpha, before["0.weight_quantizer.log_alpha"])


@pytest.mark.parametrize("weights, activations", [(4, None), ("float", None), (None, "float")])
@pytest.mark.parametrize("error", [UserError("training has diverged"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_ends_a_stage_early_is_told_as_it_is(error: BaseException, weights: Any, activations: Any) -> None:
    spec = {"method": "lsc", "bits": 2}
    recipe = QuantizeRecipe.model_validate({"weights": spec, "activations": spec})
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    convert(model, recipe)
    find_ranges(model, model, [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))])
    before, own = copy.deepcopy(model.state_dict()), [quantizer for _, quantizer in quantizers(model)]
    with pytest.raises(type(error)) as raised, stage_bits(model, recipe, weights=weights, activations=activations):
        with torch.no_grad():
            model[0].weight.fill_(torch.nan)  # of which no range can be found
        raise error
    assert raised.value is error
    assert [quantizer for _, quantizer in quantizers(model)] == own
    assert {quantizer.state for quantizer in own} == {QuantizerState.QUANTIZE}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name != "0.weight")
