"""What the inputs of layers are like: count, mean and Gram matrix in one pass, never the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer, QuantizerState

Sample = TypeVar("Sample")
CHUNK = 8192
"""Rows that are held in float64 at a time: 0.3 GB at 4608 inputs."""


class Moments:
    """Count, mean (n,) and scatter sum (x - mean)(x - mean)^T (n, n) of the rows that were added, in float64.

    Chunks are merged by the update of Chan, Golub and LeVeque (1979): exact where the mean is large, too.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:
        """E (x - mean)(x - mean)^T, (n, n)."""
        return self.scatter / self.count

    @torch.no_grad()
    def add(self, x: Tensor) -> bool:
        """Add rows (N, n); False if they hold NaN or infinity, after which the moments are void."""
        for rows in x.split(CHUNK):
            rows = rows.to(self.mean.device).double()
            mean = rows.mean(dim=0)
            if not mean.isfinite().all():
                return False
            rows = rows - mean
            total = self.count + len(rows)
            shift = mean - self.mean
            self.scatter.addmm_(rows.T, rows)
            self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / total)
            self.mean += shift * (len(rows) / total)
            self.count = total
        return True


@dataclass
class LayerInputs:
    """A layer's inputs on two disjoint halves of the samples; `noise` is what activation quantization adds.

    `noise` (n,): mean (q(x) - x)^2 an input; 0 without q. q is a quantized layer's own quantizer, or `quantizer` with
    the range of the first half and the noise of the other.
    """

    fit: Moments
    held_out: Moments
    noise: Tensor
    quantizer: Quantizer | None = field(default=None, repr=False)
    noisy_rows: int = 0

    @classmethod
    def of(cls, layer: nn.Module, quantizer: Quantizer | None) -> LayerInputs:
        """Nothing seen yet of a linear layer or an ungrouped convolution."""
        device = _weight(layer).device
        place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        size = _weight(layer)[0].numel()
        noise = torch.zeros(size, dtype=torch.float64, device=place)
        return cls(Moments(size, place), Moments(size, place), noise, quantizer and quantizer.to(device).eval())

    def add(self, layer: nn.Module, x: Tensor, held_out: bool) -> bool:
        """Add the layer's input to a half; False if it holds NaN or infinity."""
        rows = input_rows(layer, x)
        if not (self.held_out if held_out else self.fit).add(rows):
            return False
        quantizer = layer.input_quantizer if isinstance(layer, QuantizedLayer) else self.quantizer
        if quantizer is not None and len(rows):
            quantized = quantizer(x)
            if quantizer.state is QuantizerState.QUANTIZE:
                error = (input_rows(layer, quantized) - rows).square().mean(dim=0).to(self.noise.device).double()
                self.noisy_rows += len(rows)
                self.noise += (error - self.noise) * (len(rows) / self.noisy_rows)
        return True


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight (m, n) with, (N, n), from its input: patches where it is a convolution."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, n, positions)
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def gram_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of the matrices that `gather_inputs` holds: two of float64 a layer."""
    return sum(2 * 8 * _weight(layer)[0].numel() ** 2 for layer in layers)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


@torch.no_grad()
def gather_inputs(
    layers: Mapping[str, nn.Module],
    run: Callable[[Sample], object],
    samples: Iterable[tuple[str, Sample]],
    count: int,
    quantizers: Mapping[str, Quantizer] | None = None,
) -> dict[str, LayerInputs]:
    """Statistics of each layer's inputs, in one pass: the first `count // 2` samples fit, the others are held out.

    `run` passes one of the named samples through the model that the layers belong to. `quantizers` are those of float
    layers' inputs, if these are to be quantized: they find their ranges on the first half. In a distributed run all
    ranks see all samples.

    Raises:
        UserError: fewer samples than `count` or than two, an input with NaN or infinity, a layer that none reached.
    """
    count = max(count, 2)
    found = {name: LayerInputs.of(layer, (quantizers or {}).get(name)) for name, layer in layers.items()}
    current, held_out = "", False

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not found[name].add(layer, inputs[0].detach(), held_out):
                raise UserError(f"calibration sample {current} gives NaN or infinity at the input of {name}: check it")

        return record

    _set_states(found, QuantizerState.OBSERVE)
    seen = 0
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for label, sample in samples:
            current = label
            if seen == count // 2:
                _check_reached(found, "fit")
                _set_states(found, QuantizerState.QUANTIZE)
                held_out = True
            run(sample)
            seen += 1
    finally:
        for handle in hooks:
            handle.remove()
    if seen < count:
        raise UserError(f"calibrating weights needs {count} samples, but the data gave {seen}: give more of them")
    _check_reached(found, "held_out")
    return found


def _set_states(found: Mapping[str, LayerInputs], state: QuantizerState) -> None:
    for inputs in found.values():
        if inputs.quantizer is None:
            continue
        if state is QuantizerState.OBSERVE:
            inputs.quantizer.state = state
        else:
            inputs.quantizer.finish_observing()


def _check_reached(found: Mapping[str, LayerInputs], half: str) -> None:
    if missed := [name for name, inputs in found.items() if not getattr(inputs, half).count]:
        more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        raise UserError(
            f"no calibration sample of the {half.replace('_', '-')} half reached {missed[0]}{more}: give more samples, "
            "or leave the layer out (calibrate.weights.layers, or a rule that keeps it in float)"
        )
