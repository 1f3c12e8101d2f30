"""Blocks of SAM2 that are reconstructed one after another, found by structure, and what they are fitted to.

A block's inputs are those in the quantized model, its targets its outputs in the float model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.backbones.image_encoder import FpnNeck
from sam2.modeling.backbones.utils import PatchEmbed
from sam2.modeling.memory_attention import MemoryAttentionLayer
from sam2.modeling.memory_encoder import MemoryEncoder
from sam2.modeling.sam.transformer import Attention, TwoWayAttentionBlock
from sam2.modeling.sam2_utils import MLP
from torch import Tensor, nn

from qsam2.calibration.weights import choose_quantized
from qsam2.errors import UserError
from qsam2.layers.convert import QUANT_LAYERS, quantized_weights
from qsam2.layers.hooks import hooked, nested_tensors
from qsam2.recipe.calibrate import ReconstructRecipe

Sample = TypeVar("Sample")
Scale = Literal["frame", "short", "long"]
"""Data of a block: single frames, consecutive frames through the memory, or whole videos."""

ENCODER_BLOCKS = (PatchEmbed, MultiScaleBlock, FpnNeck)
BLOCKS = (*ENCODER_BLOCKS, MemoryEncoder, MemoryAttentionLayer, TwoWayAttentionBlock, Attention, MLP)
"""Modules that are one block each; so is every quantized layer outside of them."""


PARTS: tuple[tuple[str, Scale], ...] = (
    ("image_encoder.*", "frame"),
    ("sam_mask_decoder.conv_s?", "frame"),
    ("memory_encoder*", "short"),
    ("obj_ptr_tpos_proj", "short"),
    ("memory_attention.*", "short"),
    ("mask_downsample", "long"),
    ("sam_prompt_encoder.*", "long"),
    ("sam_mask_decoder.transformer.*", "long"),
    ("sam_mask_decoder.output_upscaling.*", "long"),
    ("sam_mask_decoder.*", "long"),
    ("obj_ptr_proj", "long"),
)
"""Blocks by pattern of their names, in the order in which a tracked frame passes them, as are those within a part."""
PARALLEL = ("sam_mask_decoder.conv_s?", "sam_mask_decoder.*")
"""Parts of which no block depends on another."""


class Group(NamedTuple):
    """Blocks that are captured together, by name: one, the layers of one, or some of which none depends on another."""

    scale: Scale
    blocks: dict[str, nn.Module]


def find_blocks(model: nn.Module, recipe: ReconstructRecipe) -> list[Group]:
    """Blocks of a converted SAM2 with quantized weights that the recipe reconstructs, in order, in groups.

    With adaround, each layer is a block, and the layers of a block are a group.

    Raises:
        UserError: a pattern of `reconstruct.blocks` matches no block, or none whose weights are quantized.
    """
    modules = dict(_split(model, ""))
    quantized = {name: any(True for _ in quantized_weights(module)) for name, module in modules.items()}
    chosen = choose_quantized("reconstruct.blocks", recipe.blocks, quantized, "block", "blocks")
    groups: list[Group] = []
    last = None
    for name in sorted(chosen, key=_part):  # stable: the model's order within a part
        (part, scale), blocks = PARTS[_part(name)], {name: modules[name]}
        if recipe.method == "adaround":
            blocks = {f"{name}.{inner}".rstrip("."): layer for inner, layer, _ in quantized_weights(modules[name])}
        if part in PARALLEL and part == last:
            groups[-1].blocks.update(blocks)
        else:
            groups.append(Group(scale, blocks))
        last = part
    return groups


def _split(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, (*BLOCKS, *QUANT_LAYERS)):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _split(child, f"{name}.{key}".lstrip("."))


def _part(name: str) -> int:
    return next(index for index, (pattern, _) in enumerate(PARTS) if fnmatchcase(name, pattern))


class Call(NamedTuple):
    """One call of a block: its inputs, and the float model's outputs (see `output_tensors`)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Tensor, ...]


class CallBuffer:
    """Values of a block's calls in bounded memory: beyond `budget_bytes`, every second value is dropped."""

    def __init__(self, budget_bytes: float, stride: int = 1) -> None:
        self.budget_bytes = budget_bytes
        self.stride = stride
        self.count = 0
        self.values: list[Any] = []
        self._bytes: list[int] = []

    def add(self, value: Any) -> None:
        """Count a call, and copy its value to the CPU if its number is a multiple of the stride."""
        if self.count % self.stride == 0:
            copied = apply_to_collection(value, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
            self.values.append(copied)
            self._bytes.append(sum(tensor.nbytes for tensor in nested_tensors(copied)))
        self.count += 1
        while sum(self._bytes) > self.budget_bytes and len(self.values) > 1:
            self.values, self._bytes, self.stride = self.values[::2], self._bytes[::2], 2 * self.stride


class _AllReached(Exception):
    """Ends a forward after its last block."""


@torch.no_grad()
def capture(
    blocks: Mapping[str, nn.Module],
    float_blocks: Mapping[str, nn.Module],
    run: Callable[[bool, Sample], object],
    samples: Sequence[Sample],
    *,
    budget_bytes: float,
    one_call: bool,
) -> dict[str, list[Call]]:
    """Inputs of the blocks of a quantized model, and outputs of the float model's blocks on the same samples.

    Calls are kept on the CPU, within `budget_bytes`. `run(quantized, sample)` passes a sample through one of the two
    models; with `one_call` it calls each block once, so that the rest of the forward is skipped.

    Raises:
        UserError: a block was not reached, or its inputs or targets hold NaN or infinity.
    """
    share = budget_bytes / 2 / len(blocks)

    def record(modules: Mapping[str, nn.Module], add: Callable[..., None], quantized: bool) -> None:
        """`add(name, args, kwargs, output)` for each call of a module."""
        waiting: set[str] = set()

        def on_call(name: str, *call: Any) -> None:
            add(name, *call)
            waiting.discard(name)
            if one_call and not waiting:
                raise _AllReached

        with hooked(modules, on_call):
            for sample in samples:
                waiting.update(blocks)
                with contextlib.suppress(_AllReached):
                    run(quantized, sample)

    inputs = {name: CallBuffer(share) for name in blocks}
    record(blocks, lambda name, args, kwargs, _: inputs[name].add((args, kwargs)), True)
    targets = {name: CallBuffer(share, inputs[name].stride) for name in blocks}
    record(float_blocks, lambda name, _, __, output: targets[name].add(output_tensors(output)), False)
    calls = {}
    for name in blocks:
        given, wanted = inputs[name], targets[name]
        if not given.count:
            raise UserError(
                f"calibration samples did not reach {name}: give more clips, or leave it out of reconstruct.blocks"
            )
        if given.count != wanted.count:
            raise RuntimeError(f"{name} was called {given.count} times, in the float model {wanted.count} times")
        kept = given.values[:: wanted.stride // given.stride]
        calls[name] = [Call(args, kwargs, target) for (args, kwargs), target in zip(kept, wanted.values, strict=True)]
        if not all(tensor.isfinite().all() for tensor in nested_tensors(calls[name]) if tensor.is_floating_point()):
            raise UserError(
                f"the inputs or float outputs of {name} contain NaN or infinity: check the clips and the model"
            )
    return calls


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """Tensors of a block's output that depend on its input, which excludes position encodings."""
    if isinstance(output, dict):  # memory encoder
        return (output["vision_features"],)
    if isinstance(output, tuple) and isinstance(output[0], list):  # neck
        return tuple(output[0])
    return tuple(nested_tensors(output))
