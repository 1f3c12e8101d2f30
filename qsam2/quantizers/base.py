"""Base class of all quantizers, for weights and activations: one state, one grid, one fake-quantization operation.

A method registers its class with the type of its spec; `build_quantizer` looks it up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from qsam2.errors import UserError
from qsam2.quantizers.fake_quant import OnSums, broadcast_shape, fake_quantize
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.observers import Distribution, Observer
from qsam2.quantizers.passes import to_levels
from qsam2.quantizers.ranges import least_error_grid
from qsam2.quantizers.step_cache import clear_after_backward, hidden_from_checkpointing, version_of
from qsam2.recipe.quantizer_specs import QuantizerSpec, Role


class QuantizerState(Enum):
    """Mode of a quantizer's forward, see `Quantizer`."""

    FLOAT = 0
    OBSERVE = 1
    QUANTIZE = 2
    FROZEN = 3


class Quantizer(nn.Module):
    """Quantizes a weight or an activation; starts in FLOAT.

    FLOAT: forward returns x. OBSERVE: records x and returns it. QUANTIZE: fake-quantizes with the current parameters
    (in training mode running statistics are updated). FROZEN: fake-quantizes with the stored scale and zero point only.
    All tensors have their final shapes from the start: `scale`, `zero_point` are (num_channels,), (1,) per tensor.

    A method names its buffers in `statistics`, adds its learned parameters, and implements `_initialize` and
    `_scale_and_zero_point`; `_update_statistics`, `_on_sums` and `_transform` are optional. Errors of calibration are
    UserErrors that give the quantizer's `name`.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    """Buffers (C,) of the method, which `_initialize` sets."""
    residual_gradient: ClassVar[bool] = True
    """True if the gradient of a learned step includes the rounding of unclipped values (LSQ), False as in PACT."""

    frozen_scale: Tensor
    frozen_zero_point: Tensor
    state_code: Tensor
    is_calibrated: Tensor
    is_mid_rise: Tensor
    """Present only if calibration chooses the grid (`grid=least_error`)."""

    def __init__(
        self, spec: QuantizerSpec, role: Role, *, num_channels: int = 1, channel_dim: int = 0, name: str = ""
    ) -> None:
        super().__init__()
        self.grid = Grid.of(spec)
        self.role: Role = role
        self.channel_dim = channel_dim
        self.num_channels = num_channels if spec.granularity == "channel" else 1
        self.per_channel = spec.granularity == "channel"
        self.name = name
        self.spec = spec
        self._state = QuantizerState.FLOAT
        self._calibrated = False
        self._observer: Observer | None = None
        # scale and zero point of this optimizer step, and the `_learned` that they were computed from
        self._shared: tuple[Tensor, Tensor, object] | None = None
        for flag in ("state_code", "is_calibrated", *(["is_mid_rise"] if spec.grid == "least_error" else [])):
            self.register_buffer(flag, torch.tensor(0, dtype=torch.uint8))
        for buffer in ("frozen_scale", "frozen_zero_point", *self.statistics):
            self.register_buffer(buffer, torch.ones(self.num_channels))

    # Implemented by a method

    def _initialize(self, observed: Distribution) -> None:
        """Set parameters and statistics from the observed distribution; runs without gradients."""
        raise NotImplementedError

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (C,), with the graph to the learned parameters."""
        raise NotImplementedError

    def _update_statistics(self, x: Tensor) -> None:
        """Update statistics from x before it is quantized: weights on each forward, activations in training mode."""

    @property
    def _on_sums(self) -> OnSums | None:
        """Function to call, in training mode, with the sums of x and x^2 of an activation; None by default."""
        return None

    def _transform(self, x: Tensor) -> Tensor:
        """Transform a weight before it is quantized (identity by default), in float32 or wider."""
        return x

    def learned_parameters(self) -> list[nn.Parameter]:
        """Learned steps and clips, which get their own optimizer group."""
        return list(self.parameters())

    # Grid

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def qmin(self) -> int:
        return self.grid.qmin

    @property
    def qmax(self) -> int:
        return self.grid.qmax

    @property
    def scale(self) -> Tensor:
        """Step (C,) > 0, detached."""
        return self._current()[0].detach()

    @property
    def zero_point(self) -> Tensor:
        """Zero point (C,), float and integer-valued, or on a mid-rise grid half-way between integers; detached."""
        return self._current()[1].detach()

    def _current(self) -> tuple[Tensor, Tensor]:
        if self._state is QuantizerState.FROZEN:
            return self.frozen_scale, self.frozen_zero_point
        if self._shared is not None and self.training and self._shared[2] == self._learned():
            return self._shared[:2]
        return self._scale_and_zero_point()

    def _range_of_step(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a forward; those an activation learns are computed once per optimizer step.

        All frames and clicks of a step share one range, and recomputed (checkpointed) calls get the same one.
        """
        shares = self.role == "activation" and self.training and torch.is_grad_enabled()
        if self._state is QuantizerState.FROZEN or not shares or torch.compiler.is_compiling():
            return self._current()
        learned = self._learned()
        if self._shared is None or self._shared[2] != learned:
            with hidden_from_checkpointing():
                scale, zero_point = self._scale_and_zero_point()
            if not scale.requires_grad:
                return scale, zero_point
            self._shared = scale, zero_point, learned
            clear_after_backward(scale, self, "_shared")
        return self._shared[:2]

    def _learned(self) -> tuple[tuple[int, object], ...]:
        """Identities of the learned parameters, which a shared range keeps alive by its graph, and their versions."""
        return tuple((id(param), version_of(param)) for param in self._parameters.values() if param is not None)

    # State

    @property
    def calibrated(self) -> bool:
        """True once a range was set, by `finish_observing`, `initialize_from` or a checkpoint."""
        return self._calibrated

    @property
    def state(self) -> QuantizerState:
        return self._state

    @state.setter
    def state(self, state: QuantizerState) -> None:
        """OBSERVE starts with an empty observer and ends with `finish_observing`; QUANTIZE and FROZEN need a range."""
        if state in (QuantizerState.QUANTIZE, QuantizerState.FROZEN):
            if self._state is QuantizerState.OBSERVE:
                raise UserError(f"quantizer {self._label}: is observing, call finish_observing() before {state.name}")
            if not self._calibrated:
                problem = f"has no range yet and cannot be {state.name}, calibrate it first"
                raise UserError(f"quantizer {self._label}: {problem}")
        if state is QuantizerState.FROZEN and self._state is not QuantizerState.FROZEN:
            with torch.no_grad():
                scale, zero_point = self._scale_and_zero_point()
                self.frozen_scale.copy_(scale)
                self.frozen_zero_point.copy_(zero_point)
        self._observer = self._shared = None
        if state is QuantizerState.OBSERVE:
            self._observer = Observer(self.num_channels, self._observed_dim)
        self._state = state
        self.state_code.fill_(state.value)

    def limit_observed(self, lower: float, upper: float) -> None:
        """Clamp the observed minimum and maximum to these bounds, while in OBSERVE. Per tensor only."""
        observer = self._observer
        if observer is None:
            raise UserError(f"quantizer {self._label}: is {self._state.name}, limits apply in OBSERVE only")
        observer.minimum, observer.maximum = observer.minimum.clamp(min=lower), observer.maximum.clamp(max=upper)

    def finish_observing(self) -> None:
        """OBSERVE -> QUANTIZE: set the range from what all ranks observed. UserError if nothing was."""
        if self._observer is None:
            raise UserError(f"quantizer {self._label}: is {self._state.name}, set it to OBSERVE and run data first")
        observed = self._observer.distribution(self.frozen_scale.device)
        if observed is None:
            raise UserError(
                f"quantizer {self._label}: observed no data, let calibration batches reach this layer or keep it float"
            )
        self._start_quantizing(observed)

    def initialize_from(self, weight: Tensor) -> None:
        """Set the range from a weight and go to QUANTIZE. UserError if it holds NaN or infinity."""
        self._check_channels(weight)
        weight = weight.detach()
        if weight.numel() == 0 or not torch.isfinite(weight).all():
            raise UserError(f"quantizer {self._label}: weight is empty or contains NaN or infinity, check the file")
        self._start_quantizing(Distribution.of(weight, self._observed_dim))

    @torch.no_grad()
    def _start_quantizing(self, observed: Distribution) -> None:
        if self.spec.grid == "least_error":
            self.is_mid_rise.fill_(least_error_grid(observed, self.grid).mid_rise)
            self._read_grid()
        self._initialize(observed)
        scale, zero_point = self._scale_and_zero_point()
        if not (scale.isfinite().all() and (scale > 0).all() and zero_point.isfinite().all()):
            raise UserError(
                f"quantizer {self._label}: no range for values from {float(observed.minimum.min()):g} to "
                f"{float(observed.maximum.max()):g}; check the checkpoint, or choose another method"
            )
        self._calibrated = True
        self.is_calibrated.fill_(1)
        self._observer = None
        self._state = QuantizerState.FLOAT
        self.state = QuantizerState.QUANTIZE

    def freeze(self, weight: Tensor | None = None) -> None:
        """QUANTIZE -> FROZEN: store scale and zero point.

        With `weight`, statistics are updated from it first and the method's `_transform` is applied to it in place;
        without, the statistics of the last forward are stored.
        """
        if weight is not None and self._state is QuantizerState.QUANTIZE:
            self._update_statistics(weight.detach())
            with torch.no_grad():
                if (transformed := self._transform(weight)) is not weight:
                    weight.copy_(transformed)
        self.state = QuantizerState.FROZEN

    # Quantization

    def forward(self, x: Tensor, *, with_codes: bool = False) -> Tensor:
        """Fake-quantized x, of the same shape and float dtype. Per channel, x.shape[channel_dim] is num_channels.

        `with_codes`: if it quantizes and builds a graph, the result carries its `Codes`.
        """
        state = self._state
        if state is QuantizerState.FLOAT:
            return x
        self._check_channels(x)
        if state is QuantizerState.OBSERVE:
            assert self._observer is not None
            if not self._observer.update(x.detach()):
                raise UserError(f"calibration batch contains NaN or infinity at {self._label}: check the inputs")
            return x
        quantizes = state is QuantizerState.QUANTIZE
        updates = quantizes and (self.role == "weight" or self.training) and not _in_backward()
        if updates:
            self._update_statistics(x.detach())
        scale, zero_point = self._range_of_step()
        quantized = fake_quantize(
            self._transform(x) if quantizes else x,
            scale,
            zero_point,
            self.qmin,
            self.qmax,
            channel_dim=self.channel_dim,
            mid_rise=self.grid.mid_rise,
            identity_gradient=self.spec.clipped_gradient == "identity",
            exact_gradient=self.role == "weight",
            residual_gradient=self.residual_gradient,
            # LSQ's N counts the features of one sample, so that the batch size and the number of ranks do not matter
            num_samples=1 if self.role == "weight" else max(len(x), 1),
            with_codes=with_codes and not torch.compiler.is_compiling(),
            on_sums=self._on_sums if updates and self.role == "activation" else None,
        )
        return quantized.to(x.dtype)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        """Codes qmin..qmax of x with the current scale, int32. `dequantize(to_int(x), x.dtype)` equals forward(x)."""
        self._check_channels(x)
        scale, zero_point = self._broadcast(x.ndim, "to_int")
        if self._state is QuantizerState.QUANTIZE:
            x = self._transform(x)
        levels = to_levels(x, scale, self.qmin - zero_point, self.qmax - zero_point, self.grid.mid_rise)
        return levels.add_(zero_point).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Values scale * (codes - zero_point), in `dtype` (default: that of the scale)."""
        scale, zero_point = self._broadcast(codes.ndim, "dequantize")
        dtype = dtype or scale.dtype
        return (codes.to(torch.promote_types(dtype, scale.dtype)) - zero_point).mul_(scale).to(dtype)

    def _broadcast(self, ndim: int, operation: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point, aligned with the channels of a tensor; UserError if there are none yet."""
        if not self._calibrated:
            raise UserError(f"quantizer {self._label}: {operation} needs a range, calibrate it first")
        shape = broadcast_shape(self.num_channels, ndim, self.channel_dim)
        scale, zero_point = self._current()
        return scale.view(shape), zero_point.view(shape)

    # Helpers

    @property
    def _label(self) -> str:
        return self.name or "<unnamed>"

    @property
    def _observed_dim(self) -> int | None:
        return self.channel_dim if self.per_channel else None

    def _check_channels(self, x: Tensor) -> None:
        if self.per_channel and x.shape[self.channel_dim] != self.num_channels:
            raise UserError(
                f"quantizer {self._label}: expected {self.num_channels} channels in dimension {self.channel_dim}, "
                f"got a tensor of shape {tuple(x.shape)}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # The state is saved in buffers; reading those on each forward would wait for the GPU.
        self._state = QuantizerState(int(self.state_code))
        self._calibrated = bool(self.is_calibrated)
        self._read_grid()
        observing = self._state is QuantizerState.OBSERVE
        self._observer = Observer(self.num_channels, self._observed_dim) if observing else None

    def _read_grid(self) -> None:
        if self.spec.grid == "least_error":
            self.grid = replace(self.grid, mid_rise=bool(self.is_mid_rise))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._shared = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shared": None}

    def extra_repr(self) -> str:
        kind = ("symmetric" if self.grid.symmetric else "affine") + (" mid-rise" if self.grid.mid_rise else "")
        return f"{self.role}, {self.bits} bits, {kind}, per {self.spec.granularity}, {self._state.name}"


def _in_backward() -> bool:
    """True while activation checkpointing recomputes a forward, whose statistics have been counted already.

    Without a shared range (see `step_cache`), such a forward uses statistics that later calls of the step have updated.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
