"""Finalization, and the audit: it passes what `finalize` made and refuses each planted violation."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def test_finalizing_keeps_outputs_and_parameters_and_twice_changes_nothing(calibrated):
    model, _ = calibrated
    outputs, parameters = track_video(model), dict(model.named_parameters())
    finalize(model)
    assert all(torch.equal(one, other) for one, other in zip(track_video(model), outputs, strict=True))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    finalize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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


PROJECTION = "obj_ptr_proj.layers.1"
BLOCK = "image_encoder.trunk.blocks.0"


class Dropping(nn.Module):
    """QDrop left on at test time: half of the values stay float (PTQ4SAM, SAQ-SAM)."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < 0.5, x, self.quantizer(x))


class TwoGrids(Quantizer):
    """Its integers are finer than its bits."""

    @property
    def qmin(self) -> int:
        return 2 * super().qmin

    @property
    def qmax(self) -> int:
        return 2 * super().qmax


def _soft_rounding(layer: Any) -> None:
    # AdaRound's soft rounding shipped as hard: only the first layer of a block was rounded (PTQ4SAM and followers)
    layer.weight.add_(0.3 * layer.weight_quantizer.scale[:, None] * torch.rand_like(layer.weight))


def _qdrop_left_on(block: Any) -> None:
    # set by one pattern of names, reset by a narrower one: all quantizers but one are put back
    learn_steps(block, drop=0.5)
    left = block.mlp.layers[1].input_quantizer
    harden(block)
    block.mlp.layers[1].input_quantizer = left


def _only_the_first_layer_hardened(mlp: Any) -> None:
    soften_weights(mlp)
    harden(mlp.layers[0])


def _soft_values_kept(layer: Any) -> None:
    # quantizers are back, but the weights are those of soft rounding
    rounding = SoftRounding(layer.weight, layer.weight_quantizer)
    rounding.v.add_(torch.randn_like(rounding.v))
    layer.weight.copy_(rounding(layer.weight))


def _stale_cache(layer: Any) -> None:
    layer.quantized_weight()
    layer._cached = layer._cached._replace(tensor=2 * layer.weight)


def _too_many_levels(layer: Any) -> None:
    layer.weight_quantizer.__class__ = type("Finer", (TwoGrids, type(layer.weight_quantizer)), {})
    levels = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 10 - 5.0
    layer.weight.copy_(levels * layer.weight_quantizer.scale[:, None])


def _set(**values: Any) -> Callable[[Any], None]:
    """Sets attributes; a function is called with the attribute's present value."""

    def violate(owner: Any) -> None:
        for name, value in values.items():
            setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return violate


VIOLATIONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "dropping quantizer": (
        "obj_ptr_proj.layers.0",
        _set(input_quantizer=Dropping),
        r"obj_ptr_proj.layers.0: the table says bits \(3, 4\), the model has \(3, -1\)",
    ),
    "soft rounding": (PROJECTION, _soft_rounding, f"{PROJECTION}.weight: is not its own dequantized integers"),
    "QDrop left on": (BLOCK, _qdrop_left_on, r"mlp.layers.1: the table says bits \(3, 4\), the model has \(3, -1\)"),
    "QDrop left on in attention": (
        f"{BLOCK}.attn",
        _set(v_quantizer=lambda quantizer: LearnedStep(quantizer, drop=0.5)),
        r"blocks.0.attn: the table says bits \(None, 4\), the model has \(None, -1\)",
    ),
    "soft rounding behind the first layer": (
        f"{BLOCK}.mlp",
        _only_the_first_layer_hardened,
        r"(?s)mlp.layers.1: the table says bits \(3, 4\), the model has \(-1, 4\).*weight_quantizer.v: is in float",
    ),
    "soft values shipped as hard": (
        f"{BLOCK}.mlp.layers.1",
        _soft_values_kept,
        "mlp.layers.1.weight: is not its own dequantized integers",
    ),
    "one value off its grid": (
        "mask_downsample",
        lambda layer: layer.weight[0, 0, 0, 0].mul_(1 + 1e-6),
        "mask_downsample.weight: is not its own dequantized integers",
    ),
    "stale cache": (PROJECTION, _stale_cache, f"{PROJECTION}: computes with another weight than its own"),
    "too many levels": (PROJECTION, _too_many_levels, "layers.1.weight: has 10 levels in a channel, 3 bits allow 8"),
    "layer back in float": (
        "obj_ptr_proj",
        lambda mlp: mlp.layers.__setitem__(1, nn.Linear(64, 64)),
        r"layers.1: the table says bits \(3, 4\), the model has \(None, None\)",
    ),
    "other bits": (
        f"{PROJECTION}.input_quantizer",
        _set(grid=lambda grid: replace(grid, bits=5)),
        r"layers.1: the table says bits \(3, 4\), the model has \(3, 5\)",
    ),
    "keys in float": (
        f"{BLOCK}.attn",
        _set(k_quantizer=None),
        r"blocks.0.attn: the table says bits \(None, 4\), the model has \(None, -1\)",
    ),
    **{
        f"left in {state.name}": (
            f"{PROJECTION}.input_quantizer",
            _set(state=state),
            f"{PROJECTION}.input_quantizer: is {state.name}, not FROZEN",
        )
        for state in (QuantizerState.QUANTIZE, QuantizerState.FLOAT)
    },
    "not calibrated": (
        f"{PROJECTION}.input_quantizer",
        _set(_calibrated=False),
        f"{PROJECTION}.input_quantizer: was never calibrated",
    ),
    "scale not finite": (
        f"{PROJECTION}.input_quantizer",
        lambda quantizer: quantizer.frozen_scale.fill_(float("nan")),
        "layers.1.input_quantizer: has a scale that is not positive and finite",
    ),
    "layer without a row": (
        "obj_ptr_proj",
        lambda mlp: mlp.layers.append(nn.Linear(2, 2)),
        "obj_ptr_proj.layers.3: Linear is not in the conversion table",
    ),
    "parameter without a reason": (
        "",
        lambda model: model.register_parameter("adapter", nn.Parameter(torch.zeros(2, 2))),
        "adapter: is in float and no rule keeps it",
    ),
}


def _violate(model: SAM2, violation: str) -> str:
    path, violate, message = VIOLATIONS[violation]
    with torch.no_grad():
        violate(model.get_submodule(path))
    return message


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_each_planted_violation_is_refused(finalized, violation):
    model, rows = finalized
    audit(model, rows, RECIPE)
    message = _violate(model, violation)
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


def test_a_rule_or_row_without_a_layer_is_refused(finalized):
    model, rows = finalized
    with pytest.raises(AuditError, match="gone: the table says bits"):
        audit(model, [*rows, ConvertedLayer("gone", "Linear", 4, 4, "")])
    rules = (*RECIPE.rules, Rule(match="nowhere", bits=4))
    with pytest.raises(AuditError, match="rule 'nowhere' decides on no layer"):
        audit(model, rows, RECIPE.model_copy(update={"rules": rules}))


def test_all_violations_are_named(finalized):
    model, rows = finalized
    _violate(model, "left in QUANTIZE"), _violate(model, "parameter without a reason")
    with pytest.raises(AuditError, match=r"(?s)found 2 violations:.*obj_ptr_proj.*adapter"):
        audit(model, rows)


def test_a_transposed_convolution_is_counted_by_output_channel():
    weight = torch.arange(6.0).view(3, 2).repeat_interleave(4, dim=1).view(3, 2, 2, 2)
    assert _most_levels(weight, 1) == 3 and _most_levels(weight, 0) == 2
