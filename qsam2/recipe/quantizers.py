"""What a user can set of a quantizer: one frozen type a method, chosen by the key `method`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

Role = Literal["weight", "activation"]


class QuantizerSpec(BaseModel):
    """Grid, granularity and initial range of a quantizer; what is left out is resolved by `for_role`.

    `symmetric` and `granularity` default to symmetric a channel for weights, affine a tensor for activations.
    `grid`: mid_tread has a level at zero, mid_rise has odd multiples of half a step (auto: mid_rise for symmetric
    2-bit weights). `range` is how the first range is found on calibration data; `percentile` in percent.
    `clipped_gradient` is the straight-through gradient of values beyond the clip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    bits: int
    symmetric: bool | None = None
    granularity: Literal["tensor", "channel"] | None = None
    grid: Literal["auto", "mid_tread", "mid_rise"] = "auto"
    range: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = Field(default=99.9, gt=50.0, le=100.0)
    clipped_gradient: Literal["zero", "identity"] = "zero"

    @field_validator("bits")
    @classmethod
    def _bits_in_range(cls, bits: int) -> int:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits} is not supported: give 2 to 8, or null in place of the quantizer for float")
        return bits

    @model_validator(mode="after")
    def _mid_rise_is_symmetric(self) -> Self:
        if self.grid == "mid_rise" and self.symmetric is False:
            raise ValueError("grid=mid_rise has no zero point to shift: use it with symmetric=true, or grid=mid_tread")
        return self

    def for_role(self, role: Role) -> Self:
        """The same spec with `symmetric`, `granularity` and `grid` filled in for a weight or an activation."""
        weight = role == "weight"
        symmetric = self.symmetric if self.symmetric is not None else weight or self.grid == "mid_rise"
        grid = self.grid
        if grid == "auto":
            grid = "mid_rise" if weight and symmetric and self.bits == 2 else "mid_tread"
        granularity = self.granularity or ("channel" if weight else "tensor")
        resolved: dict[str, Any] = {"symmetric": symmetric, "granularity": granularity, "grid": grid}
        return self.model_copy(update=resolved)


class MinMaxSpec(QuantizerSpec):
    """Range from min and max: weights anew each step, activations by an exponential moving average.

    With `range` percentile or mse, the range is the fixed fraction of min and max which calibration found.
    """

    method: Literal["minmax"] = "minmax"
    range: Literal["minmax", "percentile", "mse"] = "minmax"
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)


class LSQSpec(QuantizerSpec):
    """Learned step size (LSQ). `range=mean_abs` is the paper's initial step, 2 mean|x| / sqrt(Qp)."""

    method: Literal["lsq"] = "lsq"
    range: Literal["minmax", "percentile", "mse", "mean_abs"] = "mse"  # type: ignore[assignment]


class LSCSpec(QuantizerSpec):
    """Learnable statistical clipping (Q-SAM2): bounds mean -+ alpha * std, alpha learned, statistics by momentum."""

    method: Literal["lsc"] = "lsc"
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)


AnyQuantizerSpec = Annotated[Union[MinMaxSpec, LSQSpec, LSCSpec], Field(discriminator="method")]  # noqa: UP007
