"""Quantizers of weights and activations, rules for single layers, and the plan per layer that follows from both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from qsam2.errors import UserError
from qsam2.recipe.quantizer_specs import AnyQuantizerSpec, QuantizerSpec
from qsam2.recipe.section import Section

Bits = Annotated[int, Field(ge=2, le=8)]


class AllocateRecipe(Section):
    """Mixed precision: bits of the weights per layer, of least total loss under a budget.

    Layers that a rule matches keep the rule's bits.
    """

    average_bits: Annotated[float, Field(ge=2, le=8)] = 4.0
    """Budget: mean bits over all weights of the layers that no rule matches."""
    choices: Annotated[tuple[Bits, ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    """Bits to choose from."""
    sensitivity: Path | None = None
    """File of `qsam2 sensitivity` with the measured loss per layer. null: the importance score of Mix-QSAM2, from
    weights and calibration data."""

    @model_validator(mode="after")
    def _can_be_met(self) -> AllocateRecipe:
        if self.average_bits < min(self.choices):
            raise ValueError(
                f"average_bits={self.average_bits:g} is below the least of choices, {min(self.choices)}: raise one or "
                "lower the other"
            )
        return self


OWN_BITS = "the recipe's bits"
"""Reason of the layers that no rule matches."""


class Rule(Section):
    """Bits of the layers whose name matches, or their exemption from quantization.

    An attention is a layer as well: its activation bits are those of q, k and v.
    """

    match: Annotated[str, Field(min_length=1)]
    """Pattern of whole module names; * stands for any characters, dots included."""
    bits: Bits | None = None
    """Bits of weights and activations. null: the recipe's."""
    weight_bits: Bits | None = None
    """Bits of weights. null: `bits`."""
    activation_bits: Bits | None = None
    """Bits of activations. null: `bits`."""
    keep_float: bool = False
    """Leave the layers in float."""
    reason: str = "the recipe's rule"
    """Reason shown in the conversion table."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        gives_bits = any(bits is not None for bits in (self.bits, self.weight_bits, self.activation_bits))
        if gives_bits == self.keep_float:
            given = "both" if gives_bits else "neither"
            raise ValueError(f"rule {self.match!r} gives {given}: give bits (2 to 8) or keep_float=true")
        return self


_OUTPUT = "makes an output: no later layer absorbs its error"
_MASK = "reads a mask by 4 to 16 weights a channel: all memory depends on them"

DEFAULT_RULES = (
    Rule(match="image_encoder.trunk.patch_embed.proj", bits=8, reason="reads the image: all layers see its error"),
    Rule(match="sam_prompt_encoder.mask_downscaling.0", bits=8, reason=_MASK),
    Rule(match="memory_encoder.mask_downsampler.encoder.0", bits=8, reason=_MASK),
    Rule(match="mask_downsample", bits=8, reason=_MASK),
    # Masks are products of these two.
    Rule(match="sam_mask_decoder.output_upscaling.3", bits=8, reason=_OUTPUT),
    Rule(match="sam_mask_decoder.output_hypernetworks_mlps.*.layers.2", bits=8, reason=_OUTPUT),
    Rule(match="sam_mask_decoder.iou_prediction_head.layers.2", bits=8, reason=_OUTPUT),
    # One linear layer in SAM 2, three in SAM 2.1.
    Rule(match="sam_mask_decoder.pred_obj_score_head", bits=8, reason=_OUTPUT),
    Rule(match="sam_mask_decoder.pred_obj_score_head.layers.2", bits=8, reason=_OUTPUT),
    Rule(match="obj_ptr_proj", bits=8, reason=_OUTPUT),
    Rule(match="obj_ptr_proj.layers.2", bits=8, reason=_OUTPUT),
)
"""First and last layers at 8 bits: about 0.1 million of Tiny's 38.9 million parameters.

What is no Linear, Conv2d, ConvTranspose2d or attention is float by nature: LayerNorm, softmax, the random-Fourier
position encoding, embeddings.
"""


@dataclass(frozen=True)
class LayerPlan:
    """Quantizers of one layer; None is float."""

    weights: QuantizerSpec | None
    activations: QuantizerSpec | None
    reason: str


@dataclass(frozen=True)
class ConvertedLayer:
    """A row of the conversion table; bits are None for float (an attention has no weights of its own)."""

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    reason: str


class QuantizeRecipe(Section):
    """Quantizers of weights and activations, and rules for single layers."""

    weights: AnyQuantizerSpec | None = None
    """Quantizer of all weights. null: weights stay in float."""
    activations: AnyQuantizerSpec | None = None
    """Quantizer of all activations. null: activations stay in float."""
    rules: tuple[Rule, ...] = ()
    """Exceptions by layer; the first that matches wins. After them come the default rules: first and last layers at
    8 bits."""
    allocate: AllocateRecipe | None = None
    """Mixed precision. null: the same bits in all layers; null in a packed model as well, whose rules hold the
    result."""

    @model_validator(mode="after")
    def _quantizes_something(self) -> QuantizeRecipe:
        if self.weights is None and self.activations is None:
            raise ValueError(
                "neither weights nor activations are given: give one, or quantize=null for the float model"
            )
        if self.allocate is not None and self.weights is None:
            raise ValueError("allocate distributes the bits of weights, but weights is null: give it a quantizer")
        for rule in self.rules:
            for part in ("weight", "activation"):
                if getattr(rule, f"{part}_bits") is not None and getattr(self, f"{part}s") is None:
                    raise ValueError(f"rule {rule.match!r} gives {part}_bits, but {part}s is null: give it a quantizer")
        return self

    @property
    def fewest_weight_bits(self) -> int:
        """Fewest bits that a layer's weights can get: the recipe's, those of its rules, or those to choose from."""
        assert self.weights is not None
        own = [self.weights.bits] if self.allocate is None else self.allocate.choices
        rules = [rule.weight_bits or rule.bits or self.weights.bits for rule in self.rules if not rule.keep_float]
        return min([*own, *rules])

    def rule_for(self, name: str) -> Rule | None:
        """First rule that matches the name of a layer, None if there is none."""
        return next((rule for rule in (*self.rules, *DEFAULT_RULES) if fnmatchcase(name, rule.match)), None)

    def plan(self, name: str) -> LayerPlan:
        """Quantizers of the layer of this name, with the reason."""
        rule = self.rule_for(name)
        if rule is None:
            return LayerPlan(self.weights, self.activations, OWN_BITS)
        if rule.keep_float:
            return LayerPlan(None, None, rule.reason)
        weights = _with_bits(self.weights, rule.weight_bits or rule.bits)
        activations = _with_bits(self.activations, rule.activation_bits or rule.bits)
        return LayerPlan(weights, activations, rule.reason)


def _with_bits(spec: QuantizerSpec | None, bits: int | None) -> QuantizerSpec | None:
    return spec if spec is None or bits is None else spec.model_copy(update={"bits": bits})


def parse_bits(bits: int | str) -> tuple[int, int | None]:
    """Bits of weights and activations from 8, "8", "4,8", "w4a8" or "w4" (activations in float: None)."""
    text = str(bits).lower()
    match = re.fullmatch(r"w(\d+)(?:a(\d+))?|(\d+)(?:,(\d+))?", text)
    if match is not None:
        weights = int(match[1] or match[3])
        activations = int(match[2] or match[4]) if match[2] or match[4] else None if match[1] else weights
        if all(2 <= number <= 8 for number in (weights, activations) if number is not None):
            return weights, activations
    raise UserError(f"--bits {bits}: give 2 to 8 for both, as 8, or for weights and activations, as w4a8, or w4")
