"""Base class of all quantizers, for weights and activations: one state, one grid, one fake-quantization operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from qsam2.errors import UserError
from qsam2.quantizers.fake_quant import broadcast_shape, fake_quantize
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.mse import least_error_grid
from qsam2.quantizers.observers import Distribution, Observer
from qsam2.quantizers.passes import to_levels
from qsam2.quantizers.step_cache import clear_after_backward, hidden_from_checkpointing
from qsam2.recipe.quantizer_specs import QuantizerSpec, Role


class QuantizerState(Enum):
    """Mode of a quantizer's forward, see `Quantizer`."""

    FLOAT = 0
    OBSERVE = 1
    QUANTIZE = 2
    FROZEN = 3


class SharedRange(NamedTuple):
    """Scale and zero point of one optimizer step, and the parameters (with versions) they were computed from."""

    scale: Tensor
    zero_point: Tensor
    source: tuple[tuple[nn.Parameter, int], ...]

    def is_of(self, source: tuple[tuple[nn.Parameter, int], ...]) -> bool:
        """True if `source` holds the same parameters, unchanged since."""
        pairs = zip(self.source, source, strict=True)
        return all(old is new and old_version == version for (old, old_version), (new, version) in pairs)


class Quantizer(nn.Module):
    """Quantizes a weight or an activation; starts in FLOAT.

    FLOAT: forward returns x. OBSERVE: records x and returns it. QUANTIZE: fake-quantizes with the current parameters
    (in training mode running statistics are updated). FROZEN: fake-quantizes with the stored scale and zero point only.
    All tensors have their final shapes from the start: `scale`, `zero_point` are (num_channels,), (1,) per tensor.

    A method implements `_initialize` and `_scale_and_zero_point`; `_update_statistics`, `_transform` and
    `learned_parameters` are optional. Errors of calibration are UserErrors that give the quantizer's `name`.
    """

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
        self._shared: SharedRange | None = None
        self.register_buffer("state_code", torch.tensor(self._state.value, dtype=torch.uint8))
        self.register_buffer("is_calibrated", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("frozen_scale", torch.ones(self.num_channels))
        self.register_buffer("frozen_zero_point", torch.zeros(self.num_channels))
        if spec.grid == "least_error":
            self.register_buffer("is_mid_rise", torch.tensor(0, dtype=torch.uint8))

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
    def needs_sums(self) -> bool:
        """True if an activation quantizer in training mode wants `_update_from_sums` called for each tensor."""
        return False

    def _update_from_sums(self, sums: Tensor, count: int) -> None:
        """Update statistics from the sums of x and x^2 (2, C) over `count` elements; see `needs_sums`."""
        raise NotImplementedError

    def _transform(self, x: Tensor) -> Tensor:
        """Transform a weight before it is quantized (identity by default), in float32 or wider."""
        return x

    def learned_parameters(self) -> list[nn.Parameter]:
        """Learned steps and clips, which get their own optimizer group."""
        return []

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
        if self._shared is not None and self.training and self._shared.is_of(self._learned()):
            return self._shared.scale, self._shared.zero_point
        return self._scale_and_zero_point()

    def _range_of_step(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a forward; those an activation learns are computed once per optimizer step.

        All frames and clicks of a step share one range, and recomputed (checkpointed) calls get the same one.
        """
        learned = self._learned()
        shares = self.role == "activation" and self.training and learned and torch.is_grad_enabled()
        if self._state is QuantizerState.FROZEN or not shares or torch.compiler.is_compiling():
            return self._current()
        if self._shared is None or not self._shared.is_of(learned):
            with hidden_from_checkpointing():
                scale, zero_point = self._scale_and_zero_point()
            if not scale.requires_grad:
                return scale, zero_point
            self._shared = SharedRange(scale, zero_point, learned)
            clear_after_backward(scale, self, "_shared")
        return self._shared.scale, self._shared.zero_point

    def _learned(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """Learned parameters with their versions."""
        return tuple((param, param._version) for param in self._parameters.values() if param is not None)

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
                raise UserError(
                    f"quantizer {self._label}: has no range yet and cannot be {state.name}, calibrate it first"
                )
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
            on_sums=self._update_from_sums if updates and self.needs_sums and self.role == "activation" else None,
        )
        return quantized.to(x.dtype)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        """Codes qmin..qmax of x with the current scale, int32. `dequantize(to_int(x), x.dtype)` equals forward(x)."""
        self._need_range("to_int")
        self._check_channels(x)
        if self._state is QuantizerState.QUANTIZE:
            x = self._transform(x)
        scale, zero_point = self._broadcast(x.ndim)
        levels = to_levels(x, scale, self.qmin - zero_point, self.qmax - zero_point, self.grid.mid_rise)
        return levels.add_(zero_point).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Values scale * (codes - zero_point), in `dtype` (default: that of the scale)."""
        self._need_range("dequantize")
        scale, zero_point = self._broadcast(codes.ndim)
        compute = torch.promote_types(dtype or scale.dtype, scale.dtype)
        return (codes.to(compute) - zero_point).mul_(scale).to(dtype or scale.dtype)

    def _broadcast(self, ndim: int) -> tuple[Tensor, Tensor]:
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

    def _need_range(self, operation: str) -> None:
        if not self._calibrated:
            raise UserError(f"quantizer {self._label}: {operation} needs a range, calibrate it first")

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
