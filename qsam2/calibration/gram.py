"""Second-order statistics of layer inputs: count, mean and Gram matrix in one pass, without keeping the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.layers.hooks import Half, gather_halves
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer, QuantizerState

Sample = TypeVar("Sample")
CHUNK = 8192
"""Rows held in float64 at a time: 0.3 GB at 4608 inputs."""
REMEDY = (
    "each half of the samples has to reach every layer: give more of them, or leave layers out "
    "(calibrate.weights.layers, or a rule that keeps them in float)"
)


@torch.no_grad()
def gather_inputs(
    layers: Mapping[str, nn.Module],
    run: Callable[[Sample], object],
    samples: Iterable[Sample],
    count: int,
    quantizers: Mapping[str, Quantizer] | None = None,
) -> dict[str, LayerInputs]:
    """Statistics of each layer's inputs, in one pass: the first `count // 2` samples fit, the others are held out.

    `run` passes one sample through the model that the layers belong to. `quantizers` are those of the inputs of float
    layers, if these are to be quantized; they are calibrated on the first half. In a distributed run all ranks see all
    samples.

    Raises:
        UserError: see `gather_halves`.
    """
    statistics = {name: LayerInputs.of(layer, (quantizers or {}).get(name)) for name, layer in layers.items()}

    def record(half: Half, name: str, x: Tensor) -> None:
        statistics[name].add(layers[name], x, half)

    gather_halves(layers, record, run, samples, count, remedy=REMEDY)
    return statistics


@dataclass
class LayerInputs:
    """Moments of a layer's inputs on two disjoint halves of the samples, and the noise of quantizing them.

    `noise` (n,): mean (q(x) - x)^2 of each input, 0 without q. q is a quantized layer's own quantizer, or `quantizer`
    with the range of the first half and the noise of the other.
    """

    fit: Moments
    held_out: Moments
    noise: Tensor
    quantizer: Quantizer | None = field(default=None, repr=False)
    noisy_rows: int = 0

    @classmethod
    def of(cls, layer: nn.Module, quantizer: Quantizer | None) -> LayerInputs:
        """Empty statistics of a linear layer or an ungrouped convolution."""
        device = _weight(layer).device
        place = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        size = _weight(layer)[0].numel()
        if quantizer is not None:
            quantizer.to(device).eval().state = QuantizerState.OBSERVE
        noise = torch.zeros(size, dtype=torch.float64, device=place)
        return cls(Moments(size, place), Moments(size, place), noise, quantizer)

    def add(self, layer: nn.Module, x: Tensor, half: Half) -> None:
        """Add the finite input of one call of the layer to a half."""
        rows = input_rows(layer, x)
        moments = self.fit if half == "fit" else self.held_out
        moments.add(rows)
        quantizer = layer.input_quantizer if isinstance(layer, QuantizedLayer) else self.quantizer
        if quantizer is None or not len(rows):
            return
        if half == "held_out" and quantizer.state is QuantizerState.OBSERVE:
            quantizer.finish_observing()
        quantized = quantizer(x)
        if quantizer.state is QuantizerState.QUANTIZE:
            error = (input_rows(layer, quantized) - rows).square().mean(dim=0).to(self.noise.device).double()
            self.noisy_rows += len(rows)
            self.noise += (error - self.noise) * (len(rows) / self.noisy_rows)


class Moments:
    """Count, mean (n,) and scatter sum (x - mean)(x - mean)^T (n, n) of rows, accumulated in float64.

    Chunks are merged by the update of Chan, Golub and LeVeque (1979), which stays exact when the mean is large.
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
    def add(self, x: Tensor) -> None:
        """Add finite rows (N, n)."""
        for rows in x.split(CHUNK):
            rows = rows.to(self.mean.device).double()
            mean = rows.mean(dim=0)
            rows = rows - mean
            total = self.count + len(rows)
            shift = mean - self.mean
            self.scatter.addmm_(rows.T, rows)
            self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / total)
            self.mean += shift * (len(rows) / total)
            self.count = total


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows (N, n) that a layer multiplies by its weight (m, n), from its input; a convolution's rows are patches."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, n, positions)
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def gram_bytes(layers: Iterable[nn.Module]) -> int:
    """Size in bytes of the matrices that `gather_inputs` holds: two of float64 per layer."""
    return sum(2 * 8 * _weight(layer)[0].numel() ** 2 for layer in layers)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight
