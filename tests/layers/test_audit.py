"""Finalization, and the audit: it passes what `finalize` made and refuses each planted violation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_sam2 import track_video
from torch import Tensor, nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.audit import AuditError, _most_levels, audit
from qsam2.layers.convert import convert, finalize, quantized_weights, quantizers
from qsam2.models import SAM2
from qsam2.quantizers import Quantizer, QuantizerState
from qsam2.recipe.quantize import ConvertedLayer, QuantizeRecipe, Rule
from qsam2.reconstruction.rounding import LearnedStep, SoftRounding, harden, learn_steps, soften_weights

Converted = tuple[SAM2, list[ConvertedLayer]]
RECIPE = QuantizeRecipe.model_validate(
    {
        "weights": {"method": "lsc", "bits": 3, "range": "minmax"},
        "activations": {"method": "lsc", "bits": 4, "range": "minmax"},
        "rules": [
            {"match": "obj_ptr_tpos_proj", "keep_float": True, "reason": "a test"},
            {"match": "*.qkv", "weight_bits": 2},
        ],
    }
)


@pytest.fixture(scope="module")
def _calibrated(pristine: SAM2) -> Converted:
    model = copy.deepcopy(pristine)
    rows = convert(model, RECIPE)
    find_ranges(model, lambda _: track_video(model), [0])
    return model, rows


@pytest.fixture(scope="module")
def _finalized(_calibrated: Converted) -> Converted:
    model, rows = copy.deepcopy(_calibrated)
    finalize(model)
    return model, rows


@pytest.fixture
def calibrated(_calibrated: Converted) -> Converted:
    return copy.deepcopy(_calibrated)


@pytest.fixture
def finalized(_finalized: Converted) -> Converted:
    return copy.deepcopy(_finalized)


def test_finalized_weights_are_their_own_integers(finalized):
    model, _ = finalized
    for name, layer, quantizer in quantized_weights(model):
        codes = quantizer.to_int(layer.weight)
        assert torch.equal(quantizer.dequantize(codes), layer.weight), name
        assert quantizer.qmin <= codes.min() and codes.max() <= quantizer.qmax
        for channel in layer.weight.detach().transpose(0, layer.channel_dim):
            assert channel.unique().numel() <= 2**quantizer.bits
    assert {quantizer.state for _, quantizer in quantizers(model)} == {QuantizerState.FROZEN}


def test_finalizing_twice_changes_nothing(finalized):
    model, _ = finalized
    before = copy.deepcopy(model.state_dict())
    finalize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_finalizing_does_not_change_what_the_model_computes(calibrated):
    model, _ = calibrated
    before = track_video(model)
    finalize(model)
    assert all(torch.equal(one, other) for one, other in zip(track_video(model), before, strict=True))


def test_finalizing_keeps_the_parameters_of_the_optimizer(calibrated):
    model, _ = calibrated
    before = dict(model.named_parameters())
    finalize(model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_finalized_model_passes_and_lists_what_is_float(finalized):
    model, rows = finalized
    report = audit(model, rows, RECIPE, lambda: track_video(model))
    assert report.quantizers == len(list(quantizers(model)))
    quantized = {row.name for row in rows if row.weight_bits}
    assert report.quantized_weights == sum(model.get_submodule(name).weight.numel() for name in quantized)
    reasons = {part.name: part.reason for part in report.float_parts}
    assert reasons["obj_ptr_tpos_proj.weight"] == reasons["obj_ptr_tpos_proj.bias"] == "a test"
    assert reasons["image_encoder.trunk.pos_embed"] == "position embedding"
    assert not quantized & {name.rpartition(".")[0] for name in reasons}
    text = str(report)
    assert text.startswith("audit passed: ") and "  obj_ptr_tpos_proj.weight (2,048): a test" in text.splitlines()


class Dropping(nn.Module):
    """QDrop left on at test time: half of the values stay float (PTQ4SAM, SAQ-SAM)."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < 0.5, x, self.quantizer(x))


def _drop(model: SAM2) -> None:
    model.obj_ptr_proj.layers[0].input_quantizer = Dropping(model.obj_ptr_proj.layers[0].input_quantizer)


def _soft_rounding(model: SAM2) -> None:
    # AdaRound's soft rounding shipped as hard: only the first layer of a block was rounded (PTQ4SAM and followers)
    layer = model.obj_ptr_proj.layers[1]
    layer.weight.add_(0.3 * layer.weight_quantizer.scale[:, None] * torch.rand_like(layer.weight))


def _mlp(model: SAM2) -> nn.Module:
    return model.image_encoder.trunk.blocks[0].mlp


def _qdrop_left_on(model: SAM2) -> None:
    # Set by one pattern of names, reset by a narrower one: the block's quantizers are put back but for one
    learn_steps(model.image_encoder.trunk.blocks[0], drop=0.5)
    left = _mlp(model).layers[1].input_quantizer
    harden(model)
    _mlp(model).layers[1].input_quantizer = left


def _qdrop_left_on_in_attention(model: SAM2) -> None:
    attention = model.image_encoder.trunk.blocks[0].attn
    attention.v_quantizer = LearnedStep(attention.v_quantizer, drop=0.5)


def _only_the_first_layer_hardened(model: SAM2) -> None:
    soften_weights(_mlp(model))
    harden(_mlp(model).layers[0])


def _soft_values_kept(model: SAM2) -> None:
    # The same error one step later: quantizers are back, the weights are what soft rounding made of them
    layer = _mlp(model).layers[1]
    rounding = SoftRounding(layer.weight, layer.weight_quantizer)
    rounding.v.add_(torch.randn_like(rounding.v))
    layer.weight.copy_(rounding(layer.weight))


def _one_value(model: SAM2) -> None:
    model.mask_downsample.weight[0, 0, 0, 0] *= 1 + 1e-6


def _stale_cache(model: SAM2) -> None:
    layer = model.obj_ptr_proj.layers[1]
    layer.quantized_weight()
    layer._cached = layer._cached._replace(tensor=2 * layer.weight)


class TwoGrids(Quantizer):
    """Its integers are finer than its bits."""

    @property
    def qmin(self) -> int:
        return 2 * super().qmin

    @property
    def qmax(self) -> int:
        return 2 * super().qmax


def _too_many_levels(model: SAM2) -> None:
    layer = model.obj_ptr_proj.layers[1]
    layer.weight_quantizer.__class__ = type("Finer", (TwoGrids, type(layer.weight_quantizer)), {})
    levels = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 10 - 5.0
    layer.weight.copy_(levels * layer.weight_quantizer.scale[:, None])


def _back_to_float(model: SAM2) -> None:
    layer = nn.Linear(64, 64)
    model.obj_ptr_proj.layers[1] = layer


def _one_bit_more(model: SAM2) -> None:
    quantizer = model.obj_ptr_proj.layers[1].input_quantizer
    quantizer.grid = replace(quantizer.grid, bits=5)


def _one_of_three(model: SAM2) -> None:
    model.image_encoder.trunk.blocks[0].attn.k_quantizer = None


def _not_frozen(model: SAM2) -> None:
    model.obj_ptr_proj.layers[1].input_quantizer.state = QuantizerState.QUANTIZE


def _float_state(model: SAM2) -> None:
    model.obj_ptr_proj.layers[1].input_quantizer.state = QuantizerState.FLOAT


def _uncalibrated(model: SAM2) -> None:
    model.obj_ptr_proj.layers[1].input_quantizer._calibrated = False


def _bad_scale(model: SAM2) -> None:
    model.obj_ptr_proj.layers[1].input_quantizer.frozen_scale.fill_(float("nan"))


def _extra_layer(model: SAM2) -> None:
    model.obj_ptr_proj.layers.append(nn.Linear(2, 2))


def _extra_parameter(model: SAM2) -> None:
    model.adapter = nn.Parameter(torch.zeros(2, 2))


VIOLATIONS: dict[str, tuple[Any, str]] = {
    "dropping quantizer": (_drop, r"obj_ptr_proj.layers.0: the table says bits \(3, 4\), the model has \(3, -1\)"),
    "soft rounding": (_soft_rounding, "obj_ptr_proj.layers.1.weight: is not its own dequantized integers"),
    "QDrop left on": (_qdrop_left_on, r"mlp.layers.1: the table says bits \(3, 4\), the model has \(3, -1\)"),
    "QDrop left on in attention": (
        _qdrop_left_on_in_attention,
        r"blocks.0.attn: the table says bits \(None, 4\), the model has \(None, -1\)",
    ),
    "soft rounding behind the first layer": (
        _only_the_first_layer_hardened,
        r"(?s)mlp.layers.1: the table says bits \(3, 4\), the model has \(-1, 4\).*weight_quantizer.v: is in float",
    ),
    "soft values shipped as hard": (_soft_values_kept, "mlp.layers.1.weight: is not its own dequantized integers"),
    "one value off its grid": (_one_value, "mask_downsample.weight: is not its own dequantized integers"),
    "stale cache": (_stale_cache, "obj_ptr_proj.layers.1: computes with another weight than its own"),
    "too many levels": (_too_many_levels, "layers.1.weight: has 10 levels in a channel, 3 bits allow 8"),
    "layer back in float": (_back_to_float, r"layers.1: the table says bits \(3, 4\), the model has \(None, None\)"),
    "other bits": (_one_bit_more, r"layers.1: the table says bits \(3, 4\), the model has \(3, 5\)"),
    "keys in float": (_one_of_three, r"blocks.0.attn: the table says bits \(None, 4\), the model has \(None, -1\)"),
    "not frozen": (_not_frozen, "obj_ptr_proj.layers.1.input_quantizer: is QUANTIZE, not FROZEN"),
    "left in float": (_float_state, "obj_ptr_proj.layers.1.input_quantizer: is FLOAT, not FROZEN"),
    "not calibrated": (_uncalibrated, "obj_ptr_proj.layers.1.input_quantizer: was never calibrated"),
    "scale not finite": (_bad_scale, "layers.1.input_quantizer: has a scale that is not positive and finite"),
    "layer without a row": (_extra_layer, "obj_ptr_proj.layers.3: Linear is not in the conversion table"),
    "parameter without a reason": (_extra_parameter, "adapter: is in float and no rule keeps it"),
}


@pytest.mark.parametrize("violate, message", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_each_planted_violation_is_refused(finalized, violate, message):
    model, rows = finalized
    audit(model, rows, RECIPE)
    with torch.no_grad():
        violate(model)
    with pytest.raises(AuditError, match=message):
        audit(model, rows, RECIPE)


def test_a_block_that_was_soft_passes_when_it_is_hard_and_finalized(calibrated):
    model, rows = calibrated
    block = model.image_encoder.trunk.blocks[0]
    soften_weights(block)
    learn_steps(block, drop=0.5)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, SoftRounding):
                module.v.add_(torch.randn_like(module.v))
    harden(block)
    finalize(model)
    audit(model, rows, RECIPE, lambda: track_video(model))


def test_a_calibrated_model_that_is_not_finalized_is_refused(calibrated):
    model, rows = calibrated
    with pytest.raises(AuditError, match="is QUANTIZE, not FROZEN"):
        audit(model, rows)
    for _, quantizer in quantizers(model):
        quantizer.freeze()
    with pytest.raises(AuditError, match="is not its own dequantized integers"):
        audit(model, rows)


@pytest.mark.parametrize(
    "outputs, message",
    [
        (lambda: [torch.rand(2)], "two forwards differ"),
        (lambda: {"a": (torch.tensor(float("nan")),)}, "two forwards differ"),
        (lambda: None, "forward gave 0, then 0 tensors"),
    ],
)
def test_forwards_that_do_not_repeat_are_refused(finalized, outputs, message):
    model, rows = finalized
    with pytest.raises(AuditError, match=message):
        audit(model, rows, forward=outputs)


def test_a_quantizer_that_drops_at_random_is_refused(finalized):
    model, rows = finalized
    quantizer = model.obj_ptr_proj.layers[0].input_quantizer
    forward = type(quantizer).forward
    dropping = lambda self, x: torch.where(torch.rand_like(x) < 0.5, x, forward(self, x))  # noqa: E731
    quantizer.__class__ = type("QDrop", (type(quantizer),), {"forward": dropping})
    x = torch.randn(3, 64)
    with pytest.raises(AuditError, match="two forwards differ"):
        audit(model, rows, forward=lambda: model.obj_ptr_proj(x))


def test_a_rule_without_a_layer_is_refused(finalized):
    model, rows = finalized
    rules = (*RECIPE.rules, Rule(match="nowhere", bits=4))
    with pytest.raises(AuditError, match="rule 'nowhere' decides on no layer"):
        audit(model, rows, RECIPE.model_copy(update={"rules": rules}))


def test_all_violations_are_named(finalized):
    model, rows = finalized
    with torch.no_grad():
        _not_frozen(model)
        _extra_parameter(model)
    with pytest.raises(AuditError, match=r"(?s)found 2 violations:.*obj_ptr_proj.*adapter"):
        audit(model, rows)


def test_a_row_without_a_layer_is_refused(finalized):
    model, rows = finalized
    with pytest.raises(AuditError, match="gone: the table says bits"):
        audit(model, [*rows, ConvertedLayer("gone", "Linear", 4, 4, "")])


def test_a_transposed_convolution_is_counted_by_output_channel():
    weight = torch.arange(6.0).view(3, 2).repeat_interleave(4, dim=1).view(3, 2, 2, 2)
    assert _most_levels(weight, 1) == 3 and _most_levels(weight, 0) == 2
