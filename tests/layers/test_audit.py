"""Finalization, and the audit: it passes what `finalize` made and refuses each planted violation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from small_sam2 import track_video
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.audit import AuditError, audit
from qsam2.layers.convert import convert, finalize, quantizers
from qsam2.models import SAM2
from qsam2.quantizers import Quantizer, QuantizerState
from qsam2.recipe.quantize import ConvertedLayer, QuantizeRecipe, Rule
from qsam2.reconstruction.rounding import LearnedStep, SoftRounding, harden, learn_steps, soften_weights

Converted = tuple[SAM2, list[ConvertedLayer]]
SPEC = {"method": "lsc", "range": "minmax"}
RULES = ({"match": "obj_ptr_tpos_proj", "keep_float": True, "reason": "a test"}, {"match": "*.qkv", "weight_bits": 2})
RECIPE = QuantizeRecipe.model_validate(
    {"weights": {**SPEC, "bits": 3}, "activations": {**SPEC, "bits": 4}, "rules": RULES}
)


@pytest.fixture(scope="module")
def stages(pristine: SAM2) -> tuple[Converted, Converted]:
    """A calibrated model and a finalized one, with their rows."""
    model = copy.deepcopy(pristine)
    rows = convert(model, RECIPE)
    find_ranges(model, lambda _: track_video(model), [0])
    calibrated = copy.deepcopy(model)
    finalize(model)
    return (calibrated, rows), (model, rows)


@pytest.fixture
def calibrated(stages: tuple[Converted, Converted]) -> Converted:
    return copy.deepcopy(stages[0])


@pytest.fixture
def finalized(stages: tuple[Converted, Converted]) -> Converted:
    return copy.deepcopy(stages[1])


def test_finalizing_keeps_outputs_and_parameters_and_twice_changes_nothing(calibrated):
    model, _ = calibrated
    outputs, parameters = track_video(model), dict(model.named_parameters())
    finalize(model)
    assert all(torch.equal(one, other) for one, other in zip(track_video(model), outputs, strict=True))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    finalize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_finalized_model_passes_and_is_summed_up(finalized):
    model, rows = finalized
    weights = sum(model.get_submodule(row.name).weight.numel() for row in rows if row.weight_bits)
    of_quantizers = {id(p) for _, quantizer in quantizers(model) for p in quantizer.parameters()}
    biases = sum(model.get_submodule(row.name).bias.numel() for row in rows if row.weight_bits)
    others = sum(p.numel() for p in model.parameters() if id(p) not in of_quantizers) - weights - biases
    assert audit(model, rows, RECIPE, lambda: track_video(model)) == (
        f"audit passed: {len(list(quantizers(model)))} quantizers frozen, {weights:,} weights on their grids, "
        f"{others:,} values in float"
    )


PROJECTION, BLOCK = "obj_ptr_proj.layers.1", "image_encoder.trunk.blocks.0"


class TwoGrids(Quantizer):
    """Its integers are finer than its bits."""

    qmin = property(lambda self: 2 * super().qmin)
    qmax = property(lambda self: 2 * super().qmax)


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


def _drops_at_random(quantizer: Any) -> None:
    forward = type(quantizer).forward
    dropping = lambda self, x: torch.where(torch.rand_like(x) < 0.5, x, forward(self, x))  # noqa: E731
    quantizer.__class__ = type("QDrop", (type(quantizer),), {"forward": dropping})


def _set(name: str, value: Any) -> Callable[[Any], None]:
    """Sets an attribute; a function is called with its present value."""
    return lambda owner: setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)


def _bits(layer: str, table: str, model: str) -> str:
    return rf"{layer}: the table says bits \({table}\), the model has \({model}\)"


INPUT = f"{PROJECTION}.input_quantizer"
OFF_GRID = "weight: is not its own dequantized integers"
VIOLATIONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "QDrop left on": (BLOCK, _qdrop_left_on, _bits("mlp.layers.1", "3, 4", "3, -1")),
    "QDrop left on in attention": (
        f"{BLOCK}.attn",
        _set("v_quantizer", partial(LearnedStep, drop=0.5)),
        _bits("blocks.0.attn", "None, 4", "None, -1"),
    ),
    "soft rounding behind the first layer": (
        f"{BLOCK}.mlp",
        _only_the_first_layer_hardened,
        f"(?s){_bits('mlp.layers.1', '3, 4', '-1, 4')}.*weight_quantizer.v: is in float",
    ),
    "soft values shipped as hard": (f"{BLOCK}.mlp.layers.1", _soft_values_kept, f"mlp.layers.1.{OFF_GRID}"),
    "one value off its grid": (
        "mask_downsample",
        lambda layer: layer.weight[0, 0, 0, 0].mul_(1 + 1e-6),
        f"mask_downsample.{OFF_GRID}",
    ),
    "stale cache": (PROJECTION, _stale_cache, f"{PROJECTION}: computes with another weight than its own"),
    "too many levels": (PROJECTION, _too_many_levels, "layers.1.weight: has 10 levels in a channel, 3 bits allow 8"),
    "layer back in float": (
        "obj_ptr_proj",
        lambda mlp: mlp.layers.__setitem__(1, nn.Linear(64, 64)),
        _bits("layers.1", "3, 4", "None, None"),
    ),
    "other bits": (INPUT, _set("grid", partial(replace, bits=5)), _bits("layers.1", "3, 4", "3, 5")),
    "keys in float": (f"{BLOCK}.attn", _set("k_quantizer", None), _bits("blocks.0.attn", "None, 4", "None, -1")),
    "left in QUANTIZE": (INPUT, _set("state", QuantizerState.QUANTIZE), f"{INPUT}: is QUANTIZE, not FROZEN"),
    "left in FLOAT": (INPUT, _set("state", QuantizerState.FLOAT), f"{INPUT}: is FLOAT, not FROZEN"),
    "not calibrated": (INPUT, _set("_calibrated", False), f"{INPUT}: was never calibrated"),
    "scale not finite": (
        INPUT,
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
    "drops at random": (INPUT, _drops_at_random, "two forwards differ"),
}


def _violate(model: SAM2, violation: str) -> str:
    path, violate, message = VIOLATIONS[violation]
    with torch.no_grad():
        violate(model.get_submodule(path))
    return message


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_each_planted_violation_is_refused(finalized, violation):
    (model, rows), x = finalized, torch.randn(3, 64)
    audit(model, rows, RECIPE, lambda: model.obj_ptr_proj(x))
    message = _violate(model, violation)
    with pytest.raises(AuditError, match=message):
        audit(model, rows, RECIPE, lambda: model.obj_ptr_proj(x))


def test_a_block_that_was_soft_passes_when_it_is_hard_and_finalized(calibrated):
    model, rows = calibrated
    block = model.image_encoder.trunk.blocks[0]
    soften_weights(block)
    learn_steps(block, drop=0.5)
    for module in block.modules():
        if isinstance(module, SoftRounding):
            module.v.data.add_(torch.randn_like(module.v))
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


def test_forwards_rules_and_rows_that_do_not_hold_are_refused_and_all_are_named(finalized):
    model, rows = finalized
    for outputs, message in (
        (lambda: [torch.rand(2)], "two forwards differ"),
        (lambda: {"a": (torch.tensor(float("nan")),)}, "two forwards differ"),
        (lambda: torch.eye(2) @ torch.eye(2), "the model: its product q k is in no table"),
        (lambda: None, "forward gave 0, then 0 tensors"),
    ):
        with pytest.raises(AuditError, match=message):
            audit(model, rows, forward=outputs)
    with pytest.raises(AuditError, match="gone: the table says bits"):
        audit(model, [*rows, ConvertedLayer("gone", "Linear", 4, 4, "")])
    rules = (*RECIPE.rules, Rule(match="nowhere", bits=4))
    with pytest.raises(AuditError, match="rule 'nowhere' decides on no layer"):
        audit(model, rows, RECIPE.model_copy(update={"rules": rules}))
    _violate(model, "left in QUANTIZE"), _violate(model, "parameter without a reason")
    with pytest.raises(AuditError, match=r"(?s)found 2 violations:.*obj_ptr_proj.*adapter"):
        audit(model, rows)
