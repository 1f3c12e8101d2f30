"""Mixed precision: a budget of bits, and what says where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from qsam2.recipe.section import Section

Bits = Annotated[int, Field(ge=2, le=8)]


class AllocateRecipe(Section):
    """Bits a layer, chosen so that the model is harmed least; layers that a rule decides on are left to it."""

    average_bits: Annotated[float, Field(ge=2, le=8)] = 4.0
    """Budget: the mean over all weights of the layers that no rule decides on."""
    choices: Annotated[tuple[Bits, ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    sensitivity: Path | None = None
    """What `qsam2 sensitivity` measured; null: the importance of Mix-QSAM2, from weights and calibration data."""

    @model_validator(mode="after")
    def _can_be_met(self) -> AllocateRecipe:
        if self.average_bits < min(self.choices):
            raise ValueError(
                f"average_bits={self.average_bits:g} is below the least of choices, {min(self.choices)}: raise one or "
                "lower the other"
            )
        return self
