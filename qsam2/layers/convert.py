"""Conversion: float layers become quantized ones, in place and by rules; calibrated and trained, they are finalized."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from sam2.modeling.backbones.hieradet import MultiScaleAttention
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.attention import QuantAttention, QuantizedAttention, QuantMultiScaleAttention, QuantRoPEAttention
from qsam2.layers.products import exceptions_table, product_table, products
from qsam2.layers.weight import QuantConv2d, QuantConvTranspose2d, QuantizedLayer, QuantLinear
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantize import ConvertedLayer, LayerPlan, QuantizeRecipe
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


def convert_layers(run: Run) -> None:
    """Stage: replace the model's layers by quantized ones, by the recipe's rules."""
    if run.recipe.quantize is None:
        return
    with run.folder.stage("convert"):
        run.layers = convert(run.model, run.recipe.quantize)
        table = products(run.layers, run.recipe.memory)
        log.info("%s", exceptions_table(table))
        log.debug("\n%s", product_table(table))


def convert(model: nn.Module, quantize: QuantizeRecipe) -> list[ConvertedLayer]:
    """Replace the layers of a float model in place, sharing their parameters; quantizers start in FLOAT.

    A layer that a rule keeps in float stays the same object. Returns one row per layer, in the model's order.

    Raises:
        UserError: a rule of the recipe matches no layer or decides on none, a quantizer does not fit its layer.
        ValueError: the model is converted already.
    """
    if any(isinstance(module, (QuantizedLayer, QuantizedAttention)) for module in model.modules()):
        raise ValueError("the model is converted already: give a float model")
    kinds = {**QUANT_LAYERS, **QUANT_ATTENTIONS}
    layers = {name: module for name, module in model.named_modules() if type(module) in kinds}
    _check_rules(quantize, list(layers))
    rows = []
    for name, layer in layers.items():
        plan = quantize.plan(name)
        if type(layer) in QUANT_ATTENTIONS:
            reason = plan.reason if quantize.activations else "the recipe leaves activations in float"
            plan = replace(plan, weights=None, reason=reason)
        if plan.weights is not None or plan.activations is not None:
            model.set_submodule(name, _quantized(name, layer, plan))
        weight_bits, activation_bits = (spec.bits if spec else None for spec in (plan.weights, plan.activations))
        rows.append(ConvertedLayer(name, type(layer).__name__, weight_bits, activation_bits, plan.reason))
    return rows


@torch.no_grad()
def finalize(model: nn.Module) -> None:
    """Freeze all quantizers and replace each quantized weight by its dequantized integers, in place (ours).

    Afterwards `weight == dequantize(to_int(weight))` exactly. Idempotent.

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
    """Weights of a converted model as they are before rounding, by layer: copies on the CPU. Call before `finalize`."""
    latent = {}
    for name, layer, quantizer in quantized_weights(model):
        weight = layer.weight.detach().clone()
        copy.deepcopy(quantizer).freeze(weight)  # applies the method's transform
        latent[name] = weight.cpu()
    return latent


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer, Quantizer]]:
    """All layers of a model with a quantized weight: name, layer, the weight's quantizer."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            yield name, module, module.weight_quantizer


def set_state(model: nn.Module, state: QuantizerState) -> None:
    """Put all quantizers of a model into a state."""
    for _, quantizer in quantizers(model):
        quantizer.state = state


@contextlib.contextmanager
def stage_bits(
    model: nn.Module,
    quantize: QuantizeRecipe,
    *,
    weights: int | Literal["float"] | None = None,
    activations: Literal["float"] | None = None,
) -> Iterator[None]:
    """Context manager: a calibrated model with other bits, or parts in float, for a stage of its training (ours).

    Weights get `weights` bits where the recipe gives them fewer. Their ranges are found from the weights, at the start
    and, with the recipe's bits again, at the end.
    """
    paused = [q for _, q in quantizers(model) if q.role == "activation" and activations == "float"]
    changed: list[tuple[QuantizedLayer, Quantizer]] = []
    try:
        for name, layer, quantizer in list(quantized_weights(model)):
            spec = quantize.plan(name).weights
            if weights == "float":
                changed.append((layer, quantizer))
                paused.append(quantizer)
            elif weights is not None and spec is not None and quantizer.bits < weights:
                # the recipe's spec: that of the quantizer has the grid of its own bits
                wider = build_quantizer(
                    spec.model_copy(update={"bits": weights}), "weight", num_channels=quantizer.num_channels,
                    channel_dim=quantizer.channel_dim, name=quantizer.name,
                ).to(layer.weight.device).train(quantizer.training)  # fmt: skip
                wider.initialize_from(layer.weight)
                changed.append((layer, quantizer))
                layer.weight_quantizer = wider
        for quantizer in paused:
            quantizer.state = QuantizerState.FLOAT
        yield
    finally:
        for quantizer in paused:
            quantizer.state = QuantizerState.QUANTIZE
        for layer, quantizer in changed:
            layer.weight_quantizer = quantizer.to(layer.weight.device)
    for layer, quantizer in changed:  # not after an error: weights that have diverged have no range
        quantizer.initialize_from(layer.weight)


def _quantized(name: str, layer: Any, plan: LayerPlan) -> QuantizedLayer | QuantizedAttention:
    # a new module is in training mode, in which the statistics of a quantizer would change
    def activation_quantizer(part: str) -> Quantizer | None:
        if plan.activations is None:
            return None
        return build_quantizer(plan.activations, "activation", name=f"{name}.{part}_quantizer").train(layer.training)

    if type(layer) in QUANT_ATTENTIONS:
        return QUANT_ATTENTIONS[type(layer)].from_float(layer, *map(activation_quantizer, "qkv"))
    twin, weight_quantizer = QUANT_LAYERS[type(layer)], None
    if plan.weights is not None:
        channels, of_weight = layer.weight.shape[twin.channel_dim], f"{name}.weight_quantizer"
        weight_quantizer = build_quantizer(
            plan.weights, "weight", num_channels=channels, channel_dim=twin.channel_dim, name=of_weight
        ).train(layer.training)
    return twin.from_float(layer, weight_quantizer, activation_quantizer("input"))


def _check_rules(quantize: QuantizeRecipe, names: list[str]) -> None:
    """Raise UserError unless every rule of the recipe decides on some layer."""
    deciding = {id(quantize.rule_for(name)) for name in names}
    for index, rule in enumerate(quantize.rules):
        if id(rule) not in deciding:
            problem = f"matches no layer; {nearest_names(rule.match, names)}"
            if any(fnmatchcase(name, rule.match) for name in names):
                problem = "decides on no layer, earlier rules match them all: put it first or remove it"
            raise UserError(f"quantize.rules.{index}: match={rule.match!r} {problem}")


def nearest_names(pattern: str, names: Iterable[str]) -> str:
    """Part of a message on a pattern that matches nothing: the names nearest to it."""
    nearest = get_close_matches(pattern.strip("*."), list(names), n=3, cutoff=0.0)
    return f"nearest names: {', '.join(nearest)} (* stands for anything)"
