"""From a spec type to the quantizer that implements it: one dictionary, filled by a decorator."""

from __future__ import annotations

from collections.abc import Callable

from qsam2.errors import UserError
from qsam2.quantizers.base import Quantizer
from qsam2.recipe.quantizer_specs import QuantizerSpec, Role

QUANTIZERS: dict[type[QuantizerSpec], type[Quantizer]] = {}


def register(spec_type: type[QuantizerSpec]) -> Callable[[type[Quantizer]], type[Quantizer]]:
    """Class decorator: `@register(LSQSpec)` makes `build_quantizer` use the class for that spec."""

    def add(quantizer_type: type[Quantizer]) -> type[Quantizer]:
        QUANTIZERS[spec_type] = quantizer_type
        return quantizer_type

    return add


def build_quantizer(
    spec: QuantizerSpec, role: Role, *, num_channels: int | None = None, channel_dim: int = 0, name: str = ""
) -> Quantizer:
    """The quantizer of a spec for a weight or activation called `name`, in state FLOAT.

    Per channel, `num_channels` is the size of dimension `channel_dim`; per tensor both are ignored.
    """
    if type(spec) not in QUANTIZERS:
        known = ", ".join(sorted(s.model_fields["method"].default for s in QUANTIZERS))
        raise UserError(f"quantizer {name}: no method for {type(spec).__name__}, choose one of: {known}")
    try:
        spec = spec.for_role(role)
    except ValueError as error:
        raise UserError(f"quantizer {name}: {error}") from error
    if spec.granularity == "channel" and num_channels is None:
        raise UserError(f"quantizer {name}: granularity=channel is not possible here, use granularity=tensor")
    return QUANTIZERS[type(spec)](spec, role, num_channels=num_channels or 1, channel_dim=channel_dim, name=name)
