"""Quantizers as a recipe specifies them: one section per method, chosen by the key `method`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from qsam2.recipe.section import Section

Role = Literal["weight", "activation"]
GridName = Literal["auto", "mid_tread", "mid_rise", "least_error"]
FEW_BITS = 3
"""Most bits at which `grid=auto` places bounds and zero separately; at 4 bits it gains 0.1 to 0.2 dB on nano."""


class QuantizerSpec(Section):
    """Keys that all methods have; `for_role` resolves those left out."""

    roles: ClassVar[tuple[Role, ...]] = ("weight", "activation")
    has_least_error_grid: ClassVar[bool] = False

    method: str
    """Name of the method."""
    bits: int
    """Bits, from 2 to 8."""
    symmetric: bool | None = None
    """Range symmetric about zero, without a zero point. null: true for weights, false for activations."""
    granularity: Literal["tensor", "channel"] | None = None
    """One range per tensor or per channel. null: channel for weights, tensor for activations."""
    grid: GridName = "auto"
    """mid_tread: a level at zero; mid_rise: odd multiples of half a step; least_error, for affine activations: the one
    of both that fits calibration data better. auto: mid_rise for symmetric 2-bit weights, least_error for affine
    activations of lsc and mse up to 3 bits, else mid_tread."""
    clipped_gradient: Literal["zero", "identity"] = "zero"
    """Straight-through gradient of values beyond the range."""

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
        if self.grid == "least_error" and self.symmetric:
            raise ValueError("grid=least_error places the zero point: use it with symmetric=false, or grid=mid_rise")
        return self

    def check_role(self, role: Role) -> None:
        """Raise ValueError if the method, with its keys, does not suit weights or activations."""
        if role not in self.roles:
            others = ", ".join(method for method, spec in methods().items() if role in spec.roles)
            raise ValueError(f"method={self.method} is for {self.roles[0]}s only: give {role}s one of {others}")
        if role == "weight" and self.grid == "least_error":
            raise ValueError("grid=least_error is for activations only: give weights auto, mid_tread or mid_rise")

    def for_role(self, role: Role) -> Self:
        """The same spec with `symmetric`, `granularity` and `grid` filled in for a weight or an activation.

        Raises:
            ValueError: see `check_role`.
        """
        self.check_role(role)
        weight = role == "weight"
        symmetric = self.symmetric if self.symmetric is not None else weight or self.grid == "mid_rise"
        grid = self.grid
        if grid == "auto":
            grid = "mid_rise" if weight and symmetric and self.bits == 2 else "mid_tread"
            if self.has_least_error_grid and not weight and not symmetric and self.bits <= FEW_BITS:
                grid = "least_error"
        granularity = self.granularity or ("channel" if weight else "tensor")
        resolved: dict[str, Any] = {"symmetric": symmetric, "granularity": granularity, "grid": grid}
        return self.model_copy(update=resolved)


class RangedSpec(QuantizerSpec):
    """A method whose first range is found on calibration data (of weights: on themselves)."""

    range: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    """Criterion of the first range: all values, a percentile, least mean |Q(x) - x|^2.4, or least divergence."""
    percentile: float = Field(default=99.9, gt=50.0, le=100.0)
    """Percentile of range=percentile, in percent."""


class MidRiseSpec(QuantizerSpec):
    """Weights on odd multiples of half a step, at any number of bits."""

    roles = ("weight",)
    symmetric: Literal[True] = True
    grid: Literal["mid_rise"] = "mid_rise"


class MinMaxSpec(RangedSpec):
    """Range from minimum and maximum: of weights at every step, of activations by an exponential moving average.

    With another `range`, it is the fixed fraction of minimum and maximum that calibration found.
    """

    method: Literal["minmax"] = "minmax"
    range: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the moving average of activations' minimum and maximum."""


class PercentileSpec(RangedSpec):
    """Fixed range between two percentiles."""

    method: Literal["percentile"] = "percentile"
    range: Literal["percentile"] = "percentile"  # type: ignore[assignment]


class MSESpec(RangedSpec):
    """Fixed range of least mean |Q(x) - x|^2.4."""

    has_least_error_grid = True
    method: Literal["mse"] = "mse"
    range: Literal["mse"] = "mse"  # type: ignore[assignment]


class EntropySpec(RangedSpec):
    """Fixed range of least Kullback-Leibler divergence between a histogram and its quantized version."""

    method: Literal["entropy"] = "entropy"
    range: Literal["entropy"] = "entropy"  # type: ignore[assignment]


class LSQSpec(RangedSpec):
    """Learned step size (LSQ)."""

    method: Literal["lsq"] = "lsq"
    range: Literal["minmax", "percentile", "mse", "entropy", "mean_abs"] = "mse"  # type: ignore[assignment]
    """Criterion of the first range. mean_abs: the paper's initial step, 2 mean|x| / sqrt(Qp)."""


class LSQPlusSpec(RangedSpec):
    """Learned step size, and for activations a learned offset (LSQ+)."""

    method: Literal["lsq_plus"] = "lsq_plus"
    range: Literal["minmax", "percentile", "mse", "entropy", "three_sigma"] | None = None  # type: ignore[assignment]
    """Criterion of the first range. null: the paper's, three_sigma (mean -+ 3 std) for weights, mse for activations."""

    def check_role(self, role: Role) -> None:
        super().check_role(role)
        if role == "weight" and self.symmetric is False:
            raise ValueError("method=lsq_plus has an offset for activations only: weights need symmetric=true")
        if role == "activation" and (self.symmetric or self.grid == "mid_rise"):
            raise ValueError("method=lsq_plus learns an offset: give symmetric=false and grid=auto, or method=lsq")

    def for_role(self, role: Role) -> Self:
        resolved = super().for_role(role)
        default = "three_sigma" if role == "weight" else "mse"
        return resolved.model_copy(update={"range": self.range or default})


class PACTSpec(RangedSpec):
    """Learned clips of activations, with an L2 penalty (PACT)."""

    roles = ("activation",)
    method: Literal["pact"] = "pact"
    decay: float = Field(default=1e-4, ge=0.0)
    """Weight of the L2 penalty on the clips."""


class DoReFaSpec(MidRiseSpec):
    """Weights transformed by tanh, on a grid up to the largest of them (DoReFa-Net)."""

    method: Literal["dorefa"] = "dorefa"


class SAWBSpec(MidRiseSpec):
    """Weights clipped at a linear combination of their root mean square and mean magnitude (SAWB)."""

    method: Literal["sawb"] = "sawb"


class StatsQSpec(MidRiseSpec):
    """Weights clipped at twice their mean magnitude (StatsQ of OFQ); clipped weights keep their gradient."""

    method: Literal["statsq"] = "statsq"
    clipped_gradient: Literal["zero", "identity"] = "identity"


class SEQSpec(RangedSpec):
    """ParetoQ's weights: at 2 bits the stretched elastic grid with a learned clip, above that LSQ."""

    roles = ("weight",)
    method: Literal["seq"] = "seq"
    symmetric: Literal[True] = True


class LSCSpec(RangedSpec):
    """Learnable statistical clipping (Q-SAM2): the range is a learned number of standard deviations."""

    has_least_error_grid = True
    method: Literal["lsc"] = "lsc"
    momentum: float | None = Field(default=None, ge=0.0, le=1.0)
    """Decay of the moving average of the standard deviation. null: 0.99 for weights, 1 for activations, whose
    deviation stays as calibration measured it."""

    def for_role(self, role: Role) -> Self:
        default = 0.99 if role == "weight" else 1.0
        momentum = default if self.momentum is None else self.momentum
        return super().for_role(role).model_copy(update={"momentum": momentum})


def _fits_its_place(spec: QuantizerSpec, info: ValidationInfo) -> QuantizerSpec:
    """Check the method against the field that holds it, weights or activations."""
    roles: dict[str | None, Role] = {"weights": "weight", "activations": "activation"}
    if info.field_name in roles:
        spec.check_role(roles[info.field_name])
    return spec


_AnySpec = Union[  # noqa: UP007
    MinMaxSpec,
    PercentileSpec,
    MSESpec,
    EntropySpec,
    LSQSpec,
    LSQPlusSpec,
    PACTSpec,
    DoReFaSpec,
    SAWBSpec,
    StatsQSpec,
    SEQSpec,
    LSCSpec,
]
AnyQuantizerSpec = Annotated[_AnySpec, Field(discriminator="method"), AfterValidator(_fits_its_place)]


def methods() -> dict[str, type[QuantizerSpec]]:
    """All methods by name."""
    return {spec.model_fields["method"].default: spec for spec in get_args(_AnySpec)}
