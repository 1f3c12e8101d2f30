"""Reconstruction: rounding and activation steps fitted block by block to the float model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from qsam2.recipe.section import Section


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class HierarchyRecipe(Section):
    """Three time scales of video (Q-MiniSAM2), with the weights of their losses; 0 leaves out a scale and its blocks.

    Activation ranges are aggregated from frames to clips to all clips. After the blocks, the activation steps of the
    whole model are fitted to the sum of the losses.
    """

    frame: NonNegativeFloat = 1.0
    """Loss of image embeddings on single frames; scale of the image encoder's blocks."""
    short: NonNegativeFloat = 1.0
    """Loss of memory features and memory attention on successive frames; scale of the blocks of both."""
    long: NonNegativeFloat = 1.0
    """Loss of mask logits, object pointers and scores on frames spread over whole videos; scale of all other blocks."""
    iterations: NonNegativeInt = 30
    """Optimizer steps on the sum of the losses, each with one clip per scale. 0: none."""
    step_lr: PositiveFloat = 3e-3
    """Learning rate of the logarithms of activation steps."""

    @model_validator(mode="after")
    def _has_a_scale(self) -> HierarchyRecipe:
        if self.frame == self.short == self.long == 0:
            raise ValueError("frame, short and long are all 0: give at least one of them a weight, or video=null")
        return self


class ReconstructRecipe(Section):
    """Post-training reconstruction of the float model's outputs."""

    method: Literal["adaround", "brecq", "qdrop"] = "qdrop"
    """adaround: rounding, layer by layer; brecq: rounding and activation steps, block by block; qdrop: as brecq, with
    the quantization of activations dropped at random."""
    iterations: PositiveInt = 200
    """Optimizer steps per block."""
    batch_size: PositiveInt = 4
    """Calls of the block per step; one call is one frame, in tracking blocks with all objects of a clip."""
    lr: PositiveFloat = 0.02
    """Learning rate of the rounding variables."""
    step_lr: NonNegativeFloat = 1e-3
    """Learning rate of the logarithms of activation steps (brecq, qdrop). 0: they stay as calibrated."""
    regularization: NonNegativeFloat = 0.01
    """Weight of the term that drives soft rounding to 0 or 1."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the iterations before that term sets in."""
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability with which qdrop leaves an activation in float while fitting."""
    blocks: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("*",)
    """Patterns of the names of the blocks to reconstruct, as in quantize.rules."""
    video: HierarchyRecipe | None = None
    """Three time scales of video. null: all blocks are fitted on the calibration data as it is."""
    cache_gb: PositiveFloat = 4.0
    """Memory in GB for a block's inputs and targets; beyond it, every n-th call is kept. The same again for image
    features of clips; beyond it, they are computed for every block."""
