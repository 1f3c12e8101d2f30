"""Where quantization loses: signal to noise, clipping and histograms of each layer's weights and inputs (ours)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qsam2.layers.convert import quantized_weights, quantizers
from qsam2.layers.hooks import hooked
from qsam2.models import SAM2
from qsam2.quantizers import Quantizer
from qsam2.quantizers.fake_quant import broadcast_shape
from qsam2.recipe.quantize import ConvertedLayer

SHOWN = 6
"""Layers whose histograms are kept: those of the lowest signal to noise."""
BINS = 120
INPUT = "input_quantizer"


@torch.no_grad()
def measure_layers(
    layers: Sequence[ConvertedLayer],
    model: SAM2,
    teacher: SAM2,
    latent: Mapping[str, Tensor],
    run: Callable[[SAM2], object],
) -> dict[str, Any]:
    """What a report says of the layers of a finalized model; `run` passes a sample through a model.

    {"layers": rows of the conversion table with "weight_snr_db", "weight_clipped", "scale" (mean), "input_snr_db",
    "input_clipped"; "weights" and "inputs": histograms of the layers that lose most, the float model's beside ours}.
    Signal to noise is 10 log10 of the energy over that of the difference, None without noise; clipped are shares.
    """
    weights = {name: _weight_figures(layer.weight, quantizer, latent[name])
               for name, layer, quantizer in quantized_weights(model)}  # fmt: skip
    meters = {name: _Meter(quantizer) for name, quantizer in quantizers(model) if quantizer.role == "activation"}
    with hooked(
        {name: meter.quantizer for name, meter in meters.items()},
        lambda name, args, _, output: meters[name].update(args[0], output),
    ):
        run(model)
    inputs: dict[str, list[_Meter]] = defaultdict(list)  # an attention has three
    for name, meter in meters.items():
        inputs[name.rpartition(".")[0]].append(meter)
    rows = []
    for layer in layers:
        row = {**asdict(layer), **weights.get(layer.name, {})}
        if found := inputs.get(layer.name):
            signal, noise, clipped, count = (
                sum(values) for values in zip(*(meter.sums for meter in found), strict=True)
            )
            row |= {"input_snr_db": _decibels(signal, noise), "input_clipped": clipped / max(count, 1)}
        rows.append(row)
    named = dict(quantizers(model))
    shown = [f"{name}.{INPUT}" for name in _worst(rows, "input_snr_db") if f"{name}.{INPUT}" in meters][:SHOWN]
    before = {name: _Meter(named[name]) for name in shown}
    own = dict(teacher.named_modules())
    with hooked(
        {name: own[name.removesuffix(f".{INPUT}")] for name in shown},
        lambda name, args, _: before[name].update(args[0], args[0]),
        before=True,
    ):
        run(teacher)
    return {
        "layers": rows,
        "weights": [
            _histograms(
                name,
                named[f"{name}.weight_quantizer"],
                _codes_histogram(named[f"{name}.weight_quantizer"], own[name].weight.detach()),  # type: ignore[arg-type]
                _codes_histogram(named[f"{name}.weight_quantizer"], latent[name]),
            )
            for name in _worst(rows, "weight_snr_db")[:SHOWN]
        ],
        "inputs": [
            _histograms(name.removesuffix(f".{INPUT}"), named[name], before[name].counts, meters[name].counts)
            for name in shown
        ],
    }


class _Meter:
    """Sums over the inputs of a quantizer: signal, noise, clipped, count; and a histogram in codes of its grid."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.sums = [0.0, 0.0, 0.0, 0.0]
        self.counts = torch.zeros(BINS)

    def update(self, x: Tensor, quantized: Tensor) -> None:
        x, quantized = x.detach().float(), quantized.detach().float()
        codes = _codes(self.quantizer, x)
        outside = (codes < self.quantizer.qmin - 0.5) | (codes > self.quantizer.qmax + 0.5)
        noise = (x - quantized).square().sum()
        sums = (float(x.square().sum()), float(noise), float(outside.sum()), float(x.numel()))
        self.sums = [total + value for total, value in zip(self.sums, sums, strict=True)]
        self.counts = self.counts + _histogram(self.quantizer, codes)


def _weight_figures(weight: Tensor, quantizer: Quantizer, latent: Tensor) -> dict[str, Any]:
    difference = latent.to(weight) - weight
    codes = _codes(quantizer, latent.to(weight))
    outside = (codes < quantizer.qmin - 0.5) | (codes > quantizer.qmax + 0.5)
    return {
        "scale": float(quantizer.scale.mean()),
        "weight_snr_db": _decibels(float(latent.square().sum()), float(difference.square().sum())),
        "weight_clipped": float(outside.float().mean()),
    }


def _codes(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Values in steps of the grid, so that qmin and qmax are its first and last level."""
    shape = broadcast_shape(quantizer.num_channels, x.ndim, quantizer.channel_dim)
    return x / quantizer.scale.view(shape).to(x) + quantizer.zero_point.view(shape).to(x)


def _reach(quantizer: Quantizer) -> tuple[float, float]:
    beyond = max(2.0, (quantizer.qmax - quantizer.qmin) / 4)
    return quantizer.qmin - beyond, quantizer.qmax + beyond


def _histogram(quantizer: Quantizer, codes: Tensor) -> Tensor:
    low, high = _reach(quantizer)
    return torch.histc(codes.float().clamp(low, high), BINS, low, high).cpu()


def _codes_histogram(quantizer: Quantizer, weight: Tensor) -> Tensor:
    return _histogram(quantizer, _codes(quantizer, weight.to(quantizer.scale.device)))


def _histograms(name: str, quantizer: Quantizer, before: Tensor, after: Tensor) -> dict[str, Any]:
    shares = [[round(float(share), 6) for share in counts / counts.sum().clamp(min=1)] for counts in (before, after)]
    return {
        "layer": name,
        "bits": quantizer.bits,
        "levels": [quantizer.qmin, quantizer.qmax],
        "reach": list(_reach(quantizer)),
        "before": shares[0],
        "after": shares[1],
    }


def _worst(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Names of layers by signal to noise, the lowest first."""
    measured = [row for row in rows if row.get(key) is not None]
    return [row["name"] for row in sorted(measured, key=lambda row: row[key])]


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
