"""Second-order statistics of layer inputs: count, mean and Gram matrix in one pass, without keeping the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.layers.hooks import Half, gather_halves
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import QuantizerState, build_quantizer
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import QuantizerSpec

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
    quantize: QuantizeRecipe | None = None,
) -> dict[str, LayerInputs]:
    """Statistics of each layer's inputs, in one pass: the first `count // 2` samples fit, the others are held out.

    Inputs of float layers are quantized as `quantize` says, calibrated on the first half. In a distributed run all
    ranks see all samples. `run` passes one sample through the model; raises as `gather_halves`.
    """
    specs = {name: quantize.plan(name).activations if quantize else None for name in layers}
    statistics = {name: LayerInputs(name, layer, specs[name]) for name, layer in layers.items()}

    def record(half: Half, name: str, x: Tensor) -> None:
        statistics[name].add(half, x)

    gather_halves(layers, record, run, samples, count, remedy=REMEDY)
    return statistics


class LayerInputs:
    """Moments of a layer's inputs on two disjoint halves of the samples, and the noise of quantizing them.

    The layer is linear or an ungrouped convolution. `noise` (n,): mean (q(x) - x)^2 of each input, 0 without q. q is a
    quantized layer's own quantizer; that of a float layer has the range of the first half and the noise of the other.
    """

    def __init__(self, name: str, layer: nn.Module, spec: QuantizerSpec | None = None) -> None:
        self.layer = layer
        weight = layer.get_parameter("weight")
        self.quantizer = layer.input_quantizer if isinstance(layer, QuantizedLayer) else None
        if spec is not None:
            self.quantizer = (
                build_quantizer(spec, "activation", name=f"{name}.input_quantizer").to(weight.device).eval()
            )
            self.quantizer.state = QuantizerState.OBSERVE
        size, device = weight[0].numel(), weight.device
        place = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.fit, self.held_out = Moments(size, place), Moments(size, place)
        self.noise = torch.zeros(size, dtype=torch.float64, device=place)
        self.noisy_rows = 0

    def add(self, half: Half, x: Tensor) -> None:
        """Add the finite input of one call of the layer to a half."""
        rows, quantizer = input_rows(self.layer, x), self.quantizer
        (self.fit if half == "fit" else self.held_out).add(rows)
        if quantizer is None or not len(rows):
            return
        if half == "held_out" and quantizer.state is QuantizerState.OBSERVE:
            quantizer.finish_observing()
        quantized = quantizer(x)
        if quantizer.state is QuantizerState.QUANTIZE:
            error = (input_rows(self.layer, quantized) - rows).square().mean(dim=0).to(self.noise.device).double()
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

    def second_moment(self, *, centred: bool) -> Tensor:
        """Second moment (n, n) about the mean or about zero, for a layer without a bias to absorb the mean."""
        return self.covariance if centred else self.covariance + torch.outer(self.mean, self.mean)

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
    return sum(2 * 8 * layer.get_parameter("weight")[0].numel() ** 2 for layer in layers)
