"""How rounding and activation steps are fitted, block by block, to the float model."""

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
    """Video at three time scales (Q-MiniSAM2): weights of their losses; 0 leaves a scale and its blocks out.

    Ranges are aggregated from frames to clips to all clips, and activation steps are fitted to the sum of the losses
    after the blocks.
    """

    frame: NonNegativeFloat = 1.0
    """Image embeddings of single frames; blocks of the image encoder."""
    short: NonNegativeFloat = 1.0
    """Memory features and memory attention on successive frames; blocks of both."""
    long: NonNegativeFloat = 1.0
    """Mask logits, object pointers and scores on frames spread over whole videos; all other blocks."""
    iterations: NonNegativeInt = 30
    """Steps of the optimizer for the sum, each with a clip of every scale."""
    step_lr: PositiveFloat = 3e-3
    """Of the logarithms of activation steps meanwhile."""

    @model_validator(mode="after")
    def _has_a_scale(self) -> HierarchyRecipe:
        if self.frame == self.short == self.long == 0:
            raise ValueError("frame, short and long are all 0: give at least one of them a weight, or video=null")
        return self


class ReconstructRecipe(Section):
    """Post-training reconstruction: layer by layer (AdaRound), by block (BRECQ), with dropped quantization (QDrop)."""

    method: Literal["adaround", "brecq", "qdrop"] = "qdrop"
    iterations: PositiveInt = 200
    """Steps of the optimizer a block."""
    batch_size: PositiveInt = 4
    """Calls of the block a step: one frame, and in the tracking part all objects of a clip."""
    lr: PositiveFloat = 0.02
    """Of the rounding variables."""
    step_lr: NonNegativeFloat = 1e-3
    """Of the logarithms of activation steps, which brecq and qdrop learn."""
    regularization: NonNegativeFloat = 0.01
    """Strength of what drives soft rounding to 0 or 1."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the iterations without that."""
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of activations that qdrop leaves in float while it fits."""
    blocks: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("*",)
    """Patterns of the names of blocks, as in quantize.rules."""
    video: HierarchyRecipe | None = None
    """Three time scales; null: all blocks see the calibration data as it is."""
    cache_gb: PositiveFloat = 4.0
    """Memory for a block's inputs and targets; of more, every n-th call is kept. As much again for image features of
    clips; of more, they are computed for every block."""
