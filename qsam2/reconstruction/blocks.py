"""The blocks that are fitted one after another, found by structure, each with the time scale on which it works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.backbones.image_encoder import FpnNeck
from sam2.modeling.backbones.utils import PatchEmbed
from sam2.modeling.memory_attention import MemoryAttentionLayer
from sam2.modeling.memory_encoder import MemoryEncoder
from sam2.modeling.sam.transformer import Attention, TwoWayAttentionBlock
from sam2.modeling.sam2_utils import MLP
from torch import nn

from qsam2.errors import UserError
from qsam2.layers.convert import QUANT_LAYERS, quantized_weights
from qsam2.recipe.reconstruct import ReconstructRecipe

Scale = Literal["frame", "short", "long"]
"""What a block sees: one frame, consecutive frames through the memory, a whole video."""

ENCODER_BLOCKS = (PatchEmbed, MultiScaleBlock, FpnNeck)
BLOCKS = (*ENCODER_BLOCKS, MemoryEncoder, MemoryAttentionLayer, TwoWayAttentionBlock, Attention, MLP)
"""What is fitted as one; a quantized layer outside of them is a block of its own."""


class Part(NamedTuple):
    """Blocks by a pattern of their names; `parallel` ones do not depend on each other."""

    pattern: str
    scale: Scale
    parallel: bool = False


PARTS = (
    Part("image_encoder.*", "frame"),
    Part("sam_mask_decoder.conv_s?", "frame", parallel=True),
    Part("memory_encoder*", "short"),
    Part("obj_ptr_tpos_proj", "short"),
    Part("memory_attention.*", "short"),
    Part("mask_downsample", "long"),
    Part("sam_prompt_encoder.*", "long"),
    Part("sam_mask_decoder.transformer.*", "long"),
    Part("sam_mask_decoder.output_upscaling.*", "long"),
    Part("sam_mask_decoder.*", "long", parallel=True),
    Part("obj_ptr_proj", "long"),
)
"""In the order in which a tracked frame passes them; within a part, modules stand in that order."""
NEAREST = 3


@dataclass(frozen=True)
class Block:
    """A part of the model with at least one quantized weight."""

    name: str
    module: nn.Module
    scale: Scale


def find_blocks(model: nn.Module, recipe: ReconstructRecipe) -> list[list[Block]]:
    """The blocks of a converted SAM2 that the recipe reconstructs, in their order, in groups to be captured together.

    A group is one block, or blocks of which none depends on another; with adaround it is the layers of a block.

    Raises:
        UserError: a pattern of `reconstruct.blocks` matches no block, or none whose weights are quantized.
    """
    found = dict(_split(model, ""))
    _check_patterns(recipe.blocks, found)
    chosen = [name for name in found if any(fnmatchcase(name, pattern) for pattern in recipe.blocks)]
    groups: list[list[Block]] = []
    last = None
    for name in sorted(chosen, key=_part):  # stable: the model's order within a part
        part = PARTS[_part(name)]
        layers = {name: found[name]}
        if recipe.method == "adaround":
            layers = {f"{name}.{inner}".rstrip("."): layer for inner, layer, _ in quantized_weights(found[name])}
        blocks = [Block(each, module, part.scale) for each, module in layers.items() if _is_quantized(module)]
        if part.parallel and part is last:
            groups[-1] += blocks
        elif blocks:
            groups.append(blocks)
            last = part
    return groups


def _split(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, (*BLOCKS, *QUANT_LAYERS)):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _split(child, f"{name}.{key}".lstrip("."))


def _part(name: str) -> int:
    return next(index for index, part in enumerate(PARTS) if fnmatchcase(name, part.pattern))


def _is_quantized(block: nn.Module) -> bool:
    return any(True for _ in quantized_weights(block))


def _check_patterns(patterns: tuple[str, ...], found: dict[str, nn.Module]) -> None:
    """Every pattern has to match a block with a quantized weight."""
    for pattern in patterns:
        matched = [name for name in found if fnmatchcase(name, pattern)]
        where = f"reconstruct.blocks: {pattern!r} matches"
        if not matched:
            nearest = get_close_matches(pattern.strip("*."), found, n=NEAREST, cutoff=0.0)
            raise UserError(f"{where} no block; nearest names: {', '.join(nearest)} (* stands for anything)")
        if not any(_is_quantized(found[name]) for name in matched):
            raise UserError(f"{where} only blocks whose weights the recipe keeps in float: remove it, or their rule")
