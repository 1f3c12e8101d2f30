"""Calibrated quantizers, and generated ones with their tensors, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from reference import Array, Levels
from torch import Tensor

from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantizer_specs import QuantizerSpec, Role, methods

RANGED = ("minmax", "lsq", "lsq_plus", "pact", "seq", "lsc")
MID_RISE = ("dorefa", "sawb", "statsq")
SEARCHED = ["mse", "entropy"]
CHEAP_RANGES = ["minmax", "percentile"] * 3  # a search takes ten times as long as all else


@dataclass
class Case:
    quantizer: Quantizer
    first: Tensor
    """Calibration data."""
    x: Tensor
    found: tuple[Array, Array]
    """Scale and zero point (C,) that calibration gave."""
    learned: dict[str, Array]
    """The learned parameters, moved away from their first values, (C,) or (2, C)."""

    @property
    def levels(self) -> Levels:
        return Levels(self.quantizer.bits, self.quantizer.grid.symmetric, self.quantizer.grid.mid_rise)

    @property
    def method(self) -> str:
        return self.quantizer.spec.method

    def rows(self, x: Tensor) -> Array:
        dim = self.quantizer._observed_dim
        rows = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).reshape(x.shape[dim], -1)
        return rows.detach().double().numpy()

    def first_rows(self) -> Array:
        """In float32, as calibration sees them."""
        return self.rows(self.first.float())


@st.composite
def specs(draw: st.DrawFn, method: str) -> tuple[QuantizerSpec, Role]:
    spec_type = methods()[method]
    role = draw(st.sampled_from(spec_type.roles))
    values: dict[str, Any] = {"bits": draw(st.integers(2, 8))}
    values["granularity"] = draw(st.sampled_from(["tensor", "channel", "channel", "channel"]))
    if method in RANGED:
        own = {"lsq": ["mean_abs"] * 3, "lsq_plus": ["three_sigma"] * 3}.get(method, [])
        values["range"] = draw(st.sampled_from(CHEAP_RANGES + SEARCHED + own))
        values["percentile"] = draw(st.sampled_from([75.0, 90.0, 99.9]))
    if method not in (*MID_RISE, "lsq_plus", "seq"):
        kind = draw(st.sampled_from(["affine", "mid_tread", "mid_rise", *(["least_error"] * (role == "activation"))]))
        values["symmetric"] = kind in ("mid_tread", "mid_rise")
        values["grid"] = "mid_tread" if kind == "affine" else kind
    elif method == "lsq_plus" and role == "activation":
        values["grid"] = draw(st.sampled_from(["auto", "least_error"]))
    return spec_type(**values), role


@st.composite
def cases(draw: st.DrawFn, method: str, dtypes: list[torch.dtype]) -> Case:
    spec, role = draw(specs(method))
    shape = draw(st.lists(st.integers(1, 5), max_size=2))
    channel_dim = draw(st.integers(-len(shape) - 1, len(shape)))
    shape.insert(channel_dim % (len(shape) + 1), draw(st.integers(8, 12)))
    dtype = draw(st.sampled_from(dtypes))
    size = draw(st.sampled_from([1.0, 1.0, 0.01, 30.0]))
    kind = draw(st.sampled_from(["normal", "heavy", "positive"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(3, *shape, generator=generator)
    noise = {"normal": noise, "heavy": noise**3, "positive": noise.abs() + 0.5}[kind]
    first, x = (size * noise[:2]).to(dtype)
    quantizer = build_quantizer(spec, role, num_channels=shape[channel_dim], channel_dim=channel_dim, name="q")
    calibrate(quantizer, first)
    quantizer.eval()
    found = quantizer.scale.double().numpy(), quantizer.zero_point.double().numpy()
    moved = {}
    with torch.no_grad():
        for name, parameter in quantizer.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            moved[name] = parameter.double().numpy()
    return Case(quantizer, first, x, found, moved)


def calibrate(quantizer: Quantizer, *batches: Tensor) -> None:
    """Sets the range from one weight, or from batches of an activation."""
    if quantizer.role == "weight":
        quantizer.initialize_from(*batches)
        return
    quantizer.state = QuantizerState.OBSERVE
    for batch in batches:
        quantizer(batch)
    quantizer.finish_observing()


def weight_quantizer(spec: QuantizerSpec, weight: Tensor) -> Quantizer:
    """Calibrated on a weight whose first dimension counts channels."""
    quantizer = build_quantizer(spec, "weight", num_channels=len(weight), name="w")
    calibrate(quantizer, weight)
    return quantizer


def activation_quantizer(spec: QuantizerSpec, *batches: Tensor, **kwargs: int) -> Quantizer:
    """Calibrated on batches; `kwargs` as for `build_quantizer`."""
    quantizer = build_quantizer(spec, "activation", name="a", **kwargs)
    calibrate(quantizer, *batches)
    return quantizer


def calibrated(spec: QuantizerSpec, role: str, x: Tensor) -> Quantizer:
    """A weight's or activation's quantizer, calibrated on x."""
    return weight_quantizer(spec, x) if role == "weight" else activation_quantizer(spec, x)
