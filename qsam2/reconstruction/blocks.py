"""Blocks of SAM2 that are reconstructed one after another, found by structure, each with its time scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from qsam2.layers.convert import QUANT_LAYERS, nearest_names, quantized_weights
from qsam2.recipe.calibrate import ReconstructRecipe

Scale = Literal["frame", "short", "long"]
"""Data of a block: single frames, consecutive frames through the memory, or whole videos."""

ENCODER_BLOCKS = (PatchEmbed, MultiScaleBlock, FpnNeck)
BLOCKS = (*ENCODER_BLOCKS, MemoryEncoder, MemoryAttentionLayer, TwoWayAttentionBlock, Attention, MLP)
"""Modules that are one block each; so is every quantized layer outside of them."""


class Part(NamedTuple):
    """Blocks selected by a pattern of names; `parallel` if none depends on another."""

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
"""In the order in which a tracked frame passes them, as are the modules within a part."""


@dataclass(frozen=True)
class Block:
    """A part of the model with at least one quantized weight."""

    name: str
    module: nn.Module
    scale: Scale


def find_blocks(model: nn.Module, recipe: ReconstructRecipe) -> list[list[Block]]:
    """Blocks of a converted SAM2 that the recipe reconstructs, in order, in groups that are captured together.

    A group is one block, or blocks of which none depends on another; with adaround, the layers of a block.

    Raises:
        UserError: a pattern of `reconstruct.blocks` matches no block, or none whose weights are quantized.
    """
    modules = dict(_split(model, ""))
    _check_patterns(recipe.blocks, modules)
    chosen = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in recipe.blocks)]
    groups: list[list[Block]] = []
    last = None
    for name in sorted(chosen, key=_part):  # stable: the model's order within a part
        part = PARTS[_part(name)]
        layers = {name: modules[name]}
        if recipe.method == "adaround":
            layers = {f"{name}.{inner}".rstrip("."): layer for inner, layer, _ in quantized_weights(modules[name])}
        blocks = [Block(path, module, part.scale) for path, module in layers.items() if _is_quantized(module)]
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


def _check_patterns(patterns: tuple[str, ...], modules: dict[str, nn.Module]) -> None:
    """Raise UserError unless every pattern matches a block with a quantized weight."""
    for pattern in patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        where = f"reconstruct.blocks: {pattern!r} matches"
        if not matched:
            raise UserError(f"{where} no block; {nearest_names(pattern, modules)}")
        if not any(_is_quantized(modules[name]) for name in matched):
            raise UserError(f"{where} only blocks whose weights the recipe keeps in float: remove it, or their rule")
