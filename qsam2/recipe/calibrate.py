"""Calibration: its data, changes to weights and scales before they are quantized, and how weights are rounded."""

from __future__ import annotations

from typing import Annotated, Literal, Union

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


def _method(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


def _alphas(value: object) -> object:
    if isinstance(value, (bool, str)):
        raise ValueError("give a number from 0 to 1 (0.5 in the paper), or a list of them to choose from")
    return [value] if isinstance(value, (int, float)) else value


def _listed(value: object) -> object:
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _with_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({0, *values}))


class FrobeniusRecipe(Section):
    """Weights of least Frobenius norm that keep the output on calibration data (Q-SAM2); rho chosen per layer."""

    method: Literal["frobenius"] = "frobenius"
    """Name of the method."""
    rhos: Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        *(1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    )
    """Ridges rho to choose from per layer, relative to the mean energy of its inputs; 0 (no change) is always one."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("image_encoder.*",)
    """Patterns of the names of linear layers, as in quantize.rules."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths to choose from; 0 leaves the weights alone."""
        return _with_zero(self.rhos)


class ACNRRecipe(Section):
    """Activation-aware condition number reduction (AHCQ-SAM): small singular values of the weights are raised."""

    method: Literal["acnr"] = "acnr"
    """Name of the method."""
    steps: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 3, 10, 30, 100, 300)
    """Numbers of proximal steps to choose from per layer; 0 (no change) is always one."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("image_encoder.*",)
    """Patterns of the names of linear layers, as in quantize.rules."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths to choose from; 0 leaves the weights alone."""
        return _with_zero(self.steps)


Alphas = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
WeightCalibration = Union[FrobeniusRecipe, ACNRRecipe]  # noqa: UP007


class GPTQRecipe(Section):
    """Weights are rounded column by column, later columns compensating the error of earlier ones (GPTQ)."""

    method: Literal["gptq"] = "gptq"
    """Name of the method."""
    damping: PositiveFloat = 1.0
    """Value added to the Gram matrix's diagonal, relative to its mean. The usual 0.01 overfits few clips: on nano at
    W4A4 the mIoU of box prompts falls from 27.7 to 14.4 with it, to 25.9 with 1."""


class CalibrateRecipe(Section):
    """Calibration data, drawn from the train sources without augmentation, and the methods fitted on it.

    Order: weights, smooth, ranges of activations (always), rounding.
    """

    stills: NonNegativeInt = 32
    """Single frames, run through the image encoder beside those of the clips."""
    clips: PositiveInt = 8
    """Clips, tracked from prompts on their first frame."""
    num_frames: PositiveInt = 8
    """Frames per clip."""
    weights: Annotated[WeightCalibration, Field(discriminator="method"), BeforeValidator(_method)] | None = None
    """Change of the float weights of linear layers: frobenius, acnr, or a mapping of their keys. null: none."""
    smooth: Annotated[Alphas | None, BeforeValidator(_alphas)] = None
    """Strength alpha of SmoothQuant (0.5 in the paper); of a list, the best per LayerNorm. null: no smoothing."""
    rounding: Annotated[GPTQRecipe, BeforeValidator(_method)] | None = None
    """Rounding of weights: gptq, or a mapping of its keys. null: to the nearest."""

    @model_validator(mode="after")
    def _two_halves(self) -> CalibrateRecipe:
        if self.clips > 1:
            return self
        if self.weights is not None:
            raise ValueError("clips=1 is too few: weights are fitted on one half of the clips and chosen on the other")
        if self.rounding is not None or len(self.smooth or ()) > 1:
            raise ValueError("clips=1 is too few: what is fitted on one half of the clips is chosen on the other")
        return self
