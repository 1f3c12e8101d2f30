"""Conversion: float layers become quantized layers, in place and by rules; after training they are finalized."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from sam2.modeling.backbones.hieradet import MultiScaleAttention
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.attention import (
    QuantAttention,
    QuantizedAttention,
    QuantMultiScaleAttention,
    QuantRoPEAttention,
)
from qsam2.layers.weight import QuantConv2d, QuantConvTranspose2d, QuantizedLayer, QuantLinear
from qsam2.output import aligned
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantize import ConvertedLayer, LayerPlan, QuantizeRecipe
from qsam2.recipe.quantizer_specs import QuantizerSpec
from qsam2.run import Run

QUANT_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
}
QUANT_ATTENTIONS: dict[type[nn.Module], type[QuantizedAttention]] = {
    MultiScaleAttention: QuantMultiScaleAttention,
    Attention: QuantAttention,
    RoPEAttention: QuantRoPEAttention,
}
log = logging.getLogger("qsam2")
NO_ACTIVATIONS = "the recipe leaves activations in float"
NEAREST = 3
"""How many layer names the message on a rule without a match gives."""


def convert_layers(run: Run) -> None:
    """Stage: replace the model's layers by quantized ones, by the recipe's rules."""
    if run.recipe.quantize is None:
        return
    with run.folder.stage("convert"):
        run.layers = convert(run.model, run.recipe.quantize)
        log.info("\n%s", conversion_table(run.layers))


def convert(model: nn.Module, quantize: QuantizeRecipe) -> list[ConvertedLayer]:
    """Replace the layers of a float model in place, sharing their parameters; quantizers start in FLOAT.

    What a rule keeps in float is left alone: same class, same object. Returns a row a layer, in the model's order.

    Raises:
        UserError: a rule of the recipe matches no layer or is overruled everywhere, a quantizer does not fit its layer.
        ValueError: the model has been converted before.
    """
    if any(isinstance(module, (QuantizedLayer, QuantizedAttention)) for module in model.modules()):
        raise ValueError("the model has been converted before: convert a float model")
    layers = {
        name: module for name, module in model.named_modules() if type(module) in {**QUANT_LAYERS, **QUANT_ATTENTIONS}
    }
    _check_rules(quantize, list(layers))
    rows = []
    for name, layer in layers.items():
        plan = quantize.plan(name)
        kind = type(layer).__name__
        is_attention = type(layer) in QUANT_ATTENTIONS
        weights = None if is_attention else plan.weights
        if weights is not None or plan.activations is not None:
            twin = _quantized_attention(name, layer, plan) if is_attention else _quantized_layer(name, layer, plan)
            model.set_submodule(name, twin)
        weight_bits, activation_bits = (spec.bits if spec else None for spec in (weights, plan.activations))
        reason = NO_ACTIVATIONS if is_attention and quantize.activations is None else plan.reason
        rows.append(ConvertedLayer(name, kind, weight_bits, activation_bits, reason))
    return rows


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer, Quantizer]]:
    """All layers of a model whose weight is quantized: name, layer, the weight's quantizer."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            yield name, module, module.weight_quantizer


def set_state(model: nn.Module, state: QuantizerState) -> None:
    """Put all quantizers of a model into a state."""
    for _, quantizer in quantizers(model):
        quantizer.state = state


def conversion_table(rows: Sequence[ConvertedLayer]) -> str:
    """The rows as text: layer, kind, bits of weights and activations (- is float), reason."""
    cells: list[tuple[str, ...]] = [("layer", "kind", "weights", "activations", "reason")]
    cells += [tuple("-" if value is None else str(value) for value in astuple(row)) for row in rows]
    return aligned(cells)


def _quantized_layer(name: str, layer: nn.Module, plan: LayerPlan) -> QuantizedLayer:
    twin = QUANT_LAYERS[type(layer)].from_float(layer)
    if plan.weights is not None:
        twin.weight_quantizer = build_quantizer(
            plan.weights,
            "weight",
            num_channels=twin.weight.shape[twin.channel_dim],
            channel_dim=twin.channel_dim,
            name=f"{name}.weight_quantizer",
        ).train(layer.training)
    if plan.activations is not None:
        twin.input_quantizer = _activation_quantizer(f"{name}.input_quantizer", layer, plan.activations)
    return twin


def _quantized_attention(name: str, attention: nn.Module, plan: LayerPlan) -> QuantizedAttention:
    assert plan.activations is not None
    built = (_activation_quantizer(f"{name}.{part}_quantizer", attention, plan.activations) for part in "qkv")
    return QUANT_ATTENTIONS[type(attention)].from_float(attention, *built)


def _activation_quantizer(name: str, layer: nn.Module, spec: QuantizerSpec) -> Quantizer:
    # A new module is in training mode, in which it would follow what it sees.
    return build_quantizer(spec, "activation", name=name).train(layer.training)


def _check_rules(quantize: QuantizeRecipe, names: list[str]) -> None:
    """Every rule that the user gave has to decide on some layer."""
    deciding = {id(quantize.rule_for(name)) for name in names}
    for index, rule in enumerate(quantize.rules):
        if id(rule) in deciding:
            continue
        where = f"quantize.rules.{index}: match={rule.match!r}"
        if any(fnmatchcase(name, rule.match) for name in names):
            raise UserError(f"{where} decides on no layer, earlier rules match them all: put it first or remove it")
        nearest = get_close_matches(rule.match.strip("*."), names, n=NEAREST, cutoff=0.0)
        raise UserError(f"{where} matches no layer; nearest names: {', '.join(nearest)} (* stands for anything)")


@torch.no_grad()
def finalize(model: nn.Module) -> None:
    """Freeze all quantizers and replace each quantized weight by its dequantized integers, in place (ours).

    Afterwards `weight == dequantize(to_int(weight))` exactly; a second call changes nothing.

    Raises:
        UserError: a quantizer has no range yet.
    """
    for _, layer, quantizer in quantized_weights(model):
        quantizer.freeze(layer.weight)
        layer.weight.copy_(quantizer.dequantize(quantizer.to_int(layer.weight), layer.weight.dtype))
    for _, quantizer in quantizers(model):
        if quantizer.state is not QuantizerState.FROZEN:
            quantizer.freeze()


@torch.no_grad()
def latent_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a converted model, before it is finalized, as they stand before the grid: copies on the CPU."""
    latent = {}
    for name, layer, quantizer in quantized_weights(model):
        weight = layer.weight.detach().clone()
        copy.deepcopy(quantizer).freeze(weight)  # applies what stands before the grid
        latent[name] = weight.cpu()
    return latent
