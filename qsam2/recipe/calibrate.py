"""Recipe sections of fitting without training: calibration of weights and scales, rounding, reconstruction."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import BeforeValidator, Field, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from qsam2.recipe.section import LearningRate, LearningRateOrNone, Names, Section


def _method(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


def _alphas(value: object) -> object:
    if isinstance(value, (bool, str)):
        raise ValueError("give a number from 0 to 1 (0.5 in the paper), or a list of them to choose from")
    return _numbers(value)


def _numbers(value: object) -> object:
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class FrobeniusRecipe(Section):
    """Weights of least Frobenius norm that keep the output on calibration data (Q-SAM2); rho chosen per layer."""

    method: Literal["frobenius"] = "frobenius"
    """Name of the method."""
    rhos: Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_numbers), Field(min_length=1)] = (
        *(1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    )
    """Ridges rho to choose from per layer, relative to the mean energy of its inputs; 0 (no change) is always one."""
    layers: Names = ("image_encoder.*",)
    """Patterns of the names of linear layers, as in quantize.rules."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths to choose from; 0 leaves the weights alone."""
        return tuple(sorted({0, *self.rhos}))


class ACNRRecipe(Section):
    """Activation-aware condition number reduction (AHCQ-SAM): small singular values of the weights are raised."""

    method: Literal["acnr"] = "acnr"
    """Name of the method."""
    steps: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 3, 10, 30, 100, 300)
    """Numbers of proximal steps to choose from per layer; 0 (no change) is always one."""
    layers: Names = ("image_encoder.*",)
    """Patterns of the names of linear layers, as in quantize.rules."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths to choose from; 0 leaves the weights alone."""
        return tuple(sorted({0, *self.steps}))


Alphas = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
WeightCalibration = Union[FrobeniusRecipe, ACNRRecipe]  # noqa: UP007


class GPTQRecipe(Section):
    """Weights are rounded column by column, later columns compensating the error of earlier ones (GPTQ)."""

    method: Literal["gptq"] = "gptq"
    """Name of the method."""
    damping: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_numbers), Field(min_length=1)] = (
        *(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    )
    """Value added to the Gram matrix's diagonal, relative to its mean; of several, the best per layer on held-out clips
    is taken. The nearest integers are always a choice. The usual 0.01 alone overfits few clips."""


class NearestRecipe(Section):
    """Weights are rounded to the nearest, and biases keep the mean output of each layer."""

    method: Literal["nearest"] = "nearest"
    """Name of the method."""


Rounding = Union[GPTQRecipe, NearestRecipe]  # noqa: UP007


class CalibrateRecipe(Section):
    """Calibration data, drawn from the train sources without augmentation, and the methods fitted on it.

    Order: weights, smooth, ranges of activations (always), rounding.
    """

    stills: NonNegativeInt = 32
    """Single frames, run through the image encoder beside those of the clips."""
    clips: PositiveInt = 8
    """Clips, tracked from prompts on their first frame."""
    num_frames: PositiveInt = 8
    """Frames per clip. What reads memory needs at least 2."""
    weights: Annotated[WeightCalibration, Field(discriminator="method"), BeforeValidator(_method)] | None = None
    """Change of the float weights of linear layers: frobenius, acnr, or a mapping of their keys. null: none."""
    smooth: Annotated[Alphas | None, BeforeValidator(_alphas)] = None
    """Strength alpha of SmoothQuant (0.5 in the paper); of a list, the best per LayerNorm. null: no smoothing."""
    rounding: Annotated[Rounding, Field(discriminator="method"), BeforeValidator(_method)] | None = None
    """Rounding of weights: gptq, nearest, or a mapping of their keys. null: to the nearest, with the biases as they
    are. In a run that trains, where training starts from."""

    @model_validator(mode="after")
    def _two_halves(self) -> CalibrateRecipe:
        if self.clips > 1:
            return self
        if self.weights is not None:
            raise ValueError("clips=1 is too few: weights are fitted on one half of the clips and chosen on the other")
        if self.rounding is not None or len(self.smooth or ()) > 1:
            raise ValueError("clips=1 is too few: what is fitted on one half of the clips is chosen on the other")
        return self


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
    step_lr: LearningRate = 3e-3
    """Learning rate of the logarithms of activation steps."""

    @model_validator(mode="after")
    def _has_a_scale(self) -> HierarchyRecipe:
        if self.frame == self.short == self.long == 0:
            raise ValueError("frame, short and long are all 0: give at least one of them a weight, or video=null")
        return self


class ReconstructRecipe(Section):
    """Reconstruction of the float model's outputs, block by block."""

    method: Literal["adaround", "brecq", "qdrop", "block_ap"] = "qdrop"
    """adaround: rounding, layer by layer; brecq: rounding and activation steps, block by block; qdrop: as brecq, with
    the quantization of activations dropped at random. block_ap: the weights themselves, biases, and learned steps and
    clips, block by block; the one that training can go on from."""
    iterations: PositiveInt = 200
    """Optimizer steps per block."""
    batch_size: PositiveInt = 4
    """Calls of the block per step; one call is one frame, in tracking blocks with all objects of a clip."""
    lr: LearningRate | None = None
    """Learning rate of the rounding variables, of block_ap of the weights. null: 0.02, of block_ap 1e-4."""
    step_lr: LearningRateOrNone = 1e-3
    """Learning rate of the logarithms of activation steps (brecq, qdrop) or of all learned steps and clips (block_ap).
    0: they stay as calibrated."""
    regularization: NonNegativeFloat = 0.01
    """Weight of the term that drives soft rounding to 0 or 1."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the iterations before that term sets in."""
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability with which qdrop leaves an activation in float while fitting."""
    blocks: Names = ("*",)
    """Patterns of the names of the blocks to reconstruct, as in quantize.rules."""
    video: HierarchyRecipe | None = None
    """Three time scales of video. null: all blocks are fitted on the calibration data as it is."""
    cache_gb: PositiveFloat = 4.0
    """Memory in GB for a block's inputs and targets; beyond it, every n-th call is kept. The same again for image
    features of clips; beyond it, they are computed for every block."""

    @property
    def rate(self) -> float:
        """`lr`, or the method's own."""
        return self.lr or (1e-4 if self.method == "block_ap" else 0.02)

    @model_validator(mode="after")
    def _steps_of_video(self) -> ReconstructRecipe:
        if self.method == "block_ap" and self.video is not None and self.video.iterations:
            raise ValueError(
                "method=block_ap leaves weights that can be trained, and the fit of all steps on video would freeze "
                "them: give video.iterations=0, or another method"
            )
        return self
