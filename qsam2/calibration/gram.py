"""Second-order statistics of layer inputs, as they are and as they are quantized, without keeping the inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsam2.layers.hooks import Half, gather_halves, watch_inputs
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantize import QuantizeRecipe

Sample = TypeVar("Sample")
CHUNK = 8192
"""Rows held in float64 at a time: 0.3 GB at 4608 inputs."""
REMEDY = (
    "each half of the samples has to reach every layer: give more of them, or leave layers out "
    "(calibrate.weights.layers, or a rule that keeps them in float)"
)


@torch.no_grad()
def observe_inputs(
    layers: Mapping[str, nn.Module],
    run: Callable[[Sample], object],
    samples: Iterable[Sample],
    count: int,
    quantize: QuantizeRecipe,
) -> dict[str, Quantizer]:
    """Quantizers for the inputs of float layers, as `quantize` says, calibrated on the first `count // 2` samples.

    Raises:
        UserError: see `watch_inputs`; a range cannot be found.
    """
    found: dict[str, Quantizer] = {}
    for name, layer in layers.items():
        if (spec := quantize.plan(name).activations) is not None:
            quantizer = build_quantizer(spec, "activation", name=f"{name}.input_quantizer")
            found[name] = quantizer.to(layer.get_parameter("weight").device).eval()
            quantizer.state = QuantizerState.OBSERVE
    if found:
        observed = {name: layers[name] for name in found}
        with watch_inputs(observed, lambda name, x: found[name](x), remedy=REMEDY):
            for sample in itertools.islice(samples, max(count, 2) // 2):
                run(sample)
    for quantizer in found.values():
        quantizer.finish_observing()
    return found


@torch.no_grad()
def gather_inputs(
    layers: Mapping[str, nn.Module],
    run: Callable[[Sample], object],
    samples: Iterable[Sample],
    count: int,
    quantizers: Mapping[str, Quantizer] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerInputs]:
    """Statistics of each layer's inputs, in one pass: the first `count // 2` samples fit, the others are held out.

    A quantized layer reads its inputs by its own quantizer, a float layer by that in `quantizers`, if there is one.
    Outputs are those of the layer's weight, or of that in `weights`. In a distributed run all ranks see all samples.
    `run` passes one sample through the model; raises as `gather_halves`.
    """
    readers, originals = quantizers or {}, weights or {}
    statistics = {name: LayerInputs(layer, readers.get(name), originals.get(name)) for name, layer in layers.items()}

    def record(half: Half, name: str, x: Tensor) -> None:
        statistics[name].add(half, x)

    gather_halves(layers, record, run, samples, count, remedy=REMEDY)
    return statistics


class LayerInputs:
    """Moments of a layer's inputs on two disjoint halves of the samples.

    The layer is linear or an ungrouped convolution; `quantizer` is that of its input, None where it is in float.
    """

    def __init__(self, layer: nn.Module, quantizer: Quantizer | None = None, weight: Tensor | None = None) -> None:
        self.layer = layer
        self.quantizer = layer.input_quantizer if isinstance(layer, QuantizedLayer) else quantizer
        weight = (layer.get_parameter("weight") if weight is None else weight).detach().flatten(1)
        place = torch.device("cpu") if weight.device.type == "mps" else weight.device  # MPS has no float64
        self.fit, self.held_out = Moments(weight.shape[1], place), Moments(weight.shape[1], place, weight)

    @property
    def whole(self) -> Moments:
        """Moments of both halves together."""
        return self.fit + self.held_out

    def add(self, half: Half, x: Tensor) -> None:
        """Add the finite input of one call of the layer to a half."""
        read = x if self.quantizer is None else self.quantizer(x)
        rows = input_rows(self.layer, x)
        (self.fit if half == "fit" else self.held_out).add(rows, rows if read is x else input_rows(self.layer, read))


class Moments:
    """Moments of rows x (N, n), and of the rows q (N, n) that a layer reads for them, accumulated in float64.

    Chunks are merged by the update of Chan, Golub and LeVeque (1979), which stays exact when the mean is large.

    Attributes:
        mean, read_mean: means of x and q, (n,).
        scatter: sum (q - read_mean)(q - read_mean)^T, (n, n).
        cross: sum (x - mean)(q - read_mean)^T, (n, n); the tensor `scatter` itself while all rows are read as they are.
        noise: mean (q - x)^2 of each element, (n,).
        outputs, losses: with a weight W (m, n), the sums of |W (x - mean)|^2 and |W (e - mean e)|^2, e = x - q.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", weight: Tensor | None = None) -> None:
        self.count, self.weight = 0, weight
        self.mean, self.read_mean, self.noise = torch.zeros(3, size, dtype=torch.float64, device=device)
        self.scatter = self.cross = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.outputs = self.losses = 0.0

    @property
    def covariance(self) -> Tensor:
        """E (q - read_mean)(q - read_mean)^T, (n, n)."""
        return self.scatter / self.count

    def second_moment(self, *, centred: bool) -> Tensor:
        """E q q^T (n, n) about the mean or about zero, for a layer without a bias to absorb the mean."""
        return self.covariance if centred else self.covariance + torch.outer(self.read_mean, self.read_mean)

    def cross_moment(self, *, centred: bool) -> Tensor:
        """E x q^T (n, n) about the means or about zero."""
        covariance = self.cross / self.count
        return covariance if centred else covariance + torch.outer(self.mean, self.read_mean)

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both, without `outputs` and `losses`."""
        both = Moments(len(self.mean), self.mean.device)
        both.count = self.count + other.count
        new, share = other.count / both.count, self.count * other.count / both.count
        shift, read_shift = other.mean - self.mean, other.read_mean - self.read_mean
        both.mean, both.read_mean = self.mean + shift * new, self.read_mean + read_shift * new
        both.noise = self.noise + (other.noise - self.noise) * new
        both.scatter = both.cross = (self.scatter + other.scatter).addr_(read_shift, read_shift, alpha=share)
        if self.cross is not self.scatter or other.cross is not other.scatter:
            both.cross = (self.cross + other.cross).addr_(shift, read_shift, alpha=share)
        return both

    @torch.no_grad()
    def add(self, x: Tensor, read: Tensor | None = None) -> None:
        """Add finite rows (N, n), and the rows that are read for them if these differ."""
        exact = read is None or read is x
        if not exact and self.cross is self.scatter:
            self.cross = self.scatter.clone()
        weight = None if self.weight is None else self.weight.to(self.mean)
        for rows, q in zip(x.split(CHUNK), (x if read is None else read).split(CHUNK), strict=True):
            rows = rows.to(self.mean)
            q = rows if exact else q.to(self.mean)
            total = self.count + len(rows)
            new, share = len(rows) / total, self.count * len(rows) / total
            self.noise += ((rows - q).square().mean(dim=0) - self.noise) * new
            mean = rows.mean(dim=0)
            read_mean = mean if exact else q.mean(dim=0)
            shift, read_shift = mean - self.mean, read_mean - self.read_mean
            rows = rows - mean
            q = rows if exact else q - read_mean
            self.scatter.addmm_(q.T, q).addr_(read_shift, read_shift, alpha=share)
            if self.cross is not self.scatter:
                self.cross.addmm_(rows.T, q).addr_(shift, read_shift, alpha=share)
            if weight is not None:
                self.outputs += _energy(weight, rows, shift, share)
                if self.cross is not self.scatter:
                    self.losses += _energy(weight, rows - q, shift - read_shift, share)
            self.mean += shift * new
            self.read_mean += read_shift * new
            self.count = total


def _energy(weight: Tensor, rows: Tensor, shift: Tensor, share: float) -> float:
    """Share of rows (N, n) about their mean, which is off by `shift`, in the sum of |W x|^2 about the common mean."""
    return float((rows @ weight.T).square().sum() + share * (weight @ shift).square().sum())


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows (N, n) that a layer multiplies by its weight (m, n), from its input; a convolution's rows are patches."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, n, positions)
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def gram_bytes(layers: Iterable[nn.Module]) -> int:
    """Size in bytes of the matrices that `gather_inputs` holds for quantized inputs: four of float64 per layer."""
    return sum(4 * 8 * layer.get_parameter("weight")[0].numel() ** 2 for layer in layers)
