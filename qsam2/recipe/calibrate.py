"""What calibration looks at, and whether it gives linear layers other weights before they are quantized."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from qsam2.recipe.section import Section


def _method(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


def _with_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({0, *values}))


class FrobeniusRecipe(Section):
    """Weights of least Frobenius norm that keep the output on calibration data (Q-SAM2), rho chosen a layer."""

    method: Literal["frobenius"] = "frobenius"
    rhos: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (
        *(1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    )
    """Ridges to choose from, relative to the mean energy of a layer's inputs; 0 is always among them."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("image_encoder.*",)
    """Patterns of the names of linear layers, as in quantize.rules."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """What is chosen from; 0 leaves the weights alone."""
        return _with_zero(self.rhos)


class ACNRRecipe(Section):
    """Activation-aware condition number reduction (AHCQ-SAM): small singular values of the weights are raised."""

    method: Literal["acnr"] = "acnr"
    steps: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 3, 10, 30, 100, 300)
    """Numbers of proximal steps to choose from; 0 is always among them."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("image_encoder.*",)
    """Patterns of the names of linear layers, as in quantize.rules."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """What is chosen from; 0 leaves the weights alone."""
        return _with_zero(self.steps)


WeightCalibration = Union[FrobeniusRecipe, ACNRRecipe]  # noqa: UP007


class CalibrateRecipe(Section):
    """Clips of the train sources, without augmentation, on which ranges and, if asked for, new weights are found."""

    clips: PositiveInt = 8
    num_frames: PositiveInt = 8
    weights: Annotated[WeightCalibration, Field(discriminator="method"), BeforeValidator(_method)] | None = None
    """frobenius or acnr, or their keys; null: weights stay what they are until they are quantized."""

    @model_validator(mode="after")
    def _two_halves(self) -> CalibrateRecipe:
        if self.weights is not None and self.clips < 2:
            raise ValueError("clips=1 is too few: weights are fitted on one half of the clips and chosen on the other")
        return self
