"""What a user can set of a quantizer: one frozen type a method, chosen by the key `method`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

Role = Literal["weight", "activation"]
GridName = Literal["auto", "mid_tread", "mid_rise", "least_error"]
FEW_BITS = 3
"""To which it pays to place an activation's bounds and zero one by one; at 4 bits it is worth 0.1 to 0.2 dB on nano."""


class QuantizerSpec(BaseModel):
    """Grid and granularity of a quantizer; what is left out is resolved by `for_role`.

    `symmetric` and `granularity` default to symmetric a channel for weights, affine a tensor for activations.
    `grid`: mid_tread has a level at zero, mid_rise has odd multiples of half a step; least_error, for affine
    activations (ours), is the one of both that fits calibration data better, zero then on a code or half-way between
    two. auto: mid_rise for symmetric 2-bit weights, least_error for affine activations to 3 bits of the methods that
    `has_least_error_grid` says, else mid_tread. `clipped_gradient` is the straight-through gradient of values beyond
    the clip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    roles: ClassVar[tuple[Role, ...]] = ("weight", "activation")
    has_least_error_grid: ClassVar[bool] = False

    method: str
    bits: int
    symmetric: bool | None = None
    granularity: Literal["tensor", "channel"] | None = None
    grid: GridName = "auto"
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
        if self.grid == "least_error" and self.symmetric:
            raise ValueError("grid=least_error places the zero point: use it with symmetric=false, or grid=mid_rise")
        return self

    def check_role(self, role: Role) -> None:
        """ValueError if the method, as it is set, is not one for weights or for activations."""
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
    """`range` is how the first range is found on calibration data, a weight's on itself; `percentile` in percent."""

    range: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    percentile: float = Field(default=99.9, gt=50.0, le=100.0)


class MidRiseSpec(QuantizerSpec):
    """Weights on odd multiples of half a step, at any number of bits."""

    roles = ("weight",)
    symmetric: Literal[True] = True
    grid: Literal["mid_rise"] = "mid_rise"


class MinMaxSpec(RangedSpec):
    """Range from min and max: weights anew each step, activations by an exponential moving average.

    With another `range`, it is the fixed fraction of min and max which calibration found.
    """

    method: Literal["minmax"] = "minmax"
    range: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)


class PercentileSpec(RangedSpec):
    """A fixed range that leaves out the outermost values."""

    method: Literal["percentile"] = "percentile"
    range: Literal["percentile"] = "percentile"  # type: ignore[assignment]


class MSESpec(RangedSpec):
    """A fixed range of least mean |Q(x) - x|^2.4."""

    has_least_error_grid = True
    method: Literal["mse"] = "mse"
    range: Literal["mse"] = "mse"  # type: ignore[assignment]


class EntropySpec(RangedSpec):
    """A fixed range of least Kullback-Leibler divergence between a histogram and its requantized self."""

    method: Literal["entropy"] = "entropy"
    range: Literal["entropy"] = "entropy"  # type: ignore[assignment]


class LSQSpec(RangedSpec):
    """Learned step size (LSQ). `range=mean_abs` is the paper's initial step, 2 mean|x| / sqrt(Qp)."""

    method: Literal["lsq"] = "lsq"
    range: Literal["minmax", "percentile", "mse", "entropy", "mean_abs"] = "mse"  # type: ignore[assignment]


class LSQPlusSpec(RangedSpec):
    """Learned step size, and for activations a learned offset (LSQ+).

    `range` defaults to the paper's: three_sigma (mean -+ 3 std) for weights, mse for activations.
    """

    method: Literal["lsq_plus"] = "lsq_plus"
    range: Literal["minmax", "percentile", "mse", "entropy", "three_sigma"] | None = None  # type: ignore[assignment]

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
    """Learned clips of activations (PACT), with an L2 penalty of strength `decay` on them."""

    roles = ("activation",)
    method: Literal["pact"] = "pact"
    decay: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)


class DoReFaSpec(MidRiseSpec):
    """Weights squashed by tanh, on a grid up to the largest of them (DoReFa-Net)."""

    method: Literal["dorefa"] = "dorefa"


class SAWBSpec(MidRiseSpec):
    """Weights clipped at a linear combination of their root mean square and mean magnitude (SAWB)."""

    method: Literal["sawb"] = "sawb"


class StatsQSpec(MidRiseSpec):
    """Weights clipped at twice their mean magnitude (StatsQ of OFQ); clipped weights learn on."""

    method: Literal["statsq"] = "statsq"
    clipped_gradient: Literal["zero", "identity"] = "identity"


class SEQSpec(RangedSpec):
    """Weights by ParetoQ: at 2 bits the stretched elastic grid with a learned clip, above that LSQ."""

    roles = ("weight",)
    method: Literal["seq"] = "seq"
    symmetric: Literal[True] = True


class LSCSpec(RangedSpec):
    """Learnable statistical clipping (Q-SAM2): the range is a learned number of standard deviations.

    `momentum` by which these follow: 0.99 for weights, for activations 1: they stay as calibration found them.
    """

    has_least_error_grid = True
    method: Literal["lsc"] = "lsc"
    momentum: float | None = Field(default=None, ge=0.0, le=1.0)

    def for_role(self, role: Role) -> Self:
        default = 0.99 if role == "weight" else 1.0
        momentum = default if self.momentum is None else self.momentum
        return super().for_role(role).model_copy(update={"momentum": momentum})


def _fits_its_place(spec: QuantizerSpec, info: ValidationInfo) -> QuantizerSpec:
    """A recipe says by the name of the field what the quantizer is for."""
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
