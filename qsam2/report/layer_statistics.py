"""Quantization error per layer (ours): signal-to-noise ratio, clipping and histograms of weights and inputs.

A weight is compared with its latent value, the float tensor right before rounding, an input with what its quantizer
makes of it while a sample passes. The noisiest layers also get histograms, in codes of their own grid.
"""

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
"""Number of layers with histograms: those of the lowest signal-to-noise ratio."""
BINS = 120
INPUT = ".input_quantizer"


@torch.no_grad()
def measure_layers(
    layers: Sequence[ConvertedLayer],
    model: SAM2,
    teacher: SAM2,
    latent: Mapping[str, Tensor],
    run: Callable[[SAM2], object],
) -> dict[str, Any]:
    """Statistics of the layers of a finalized model, as plain values. `run` passes a sample through a model.

    {"layers": rows of the conversion table with "weight_snr_db", "weight_clipped", "scale" (mean), "input_snr_db",
    "input_clipped"; "weights" and "inputs": histograms of the layers that lose most, before (float model) and after}.
    Signal to noise is 10 log10 of the energy over that of the difference, None without noise; clipped is a share.
    `latent`: weights right before rounding, by layer.
    """
    weights = {}
    for name, layer, quantizer in quantized_weights(model):
        weights[name] = _Meter(quantizer)
        weights[name].update(latent[name].to(layer.weight), layer.weight)
    activations = {name: _Meter(quantizer) for name, quantizer in quantizers(model) if quantizer.role == "activation"}
    with hooked(
        {name: meter.quantizer for name, meter in activations.items()},
        lambda name, args, _, output: activations[name].update(args[0], output),
    ):
        run(model)
    inputs: dict[str, list[_Meter]] = defaultdict(list)  # an attention has three
    for name, meter in activations.items():
        inputs[name.rpartition(".")[0]].append(meter)

    rows = []
    for converted in layers:
        row = asdict(converted)
        if converted.name in weights:
            meter = weights[converted.name]
            row |= {"scale": float(meter.quantizer.scale.mean())} | _figures("weight", [meter])
        if meters := inputs.get(converted.name):
            row |= _figures("input", meters)
        rows.append(row)

    noisy_weights = _noisiest(rows, "weight_snr_db")[:SHOWN]
    noisy_inputs = [name for name in _noisiest(rows, "input_snr_db") if name + INPUT in activations][:SHOWN]
    float_weights = {name: _Meter(weights[name].quantizer) for name in noisy_weights}
    for name, meter in float_weights.items():
        weight = teacher.get_submodule(name).weight
        meter.update(weight, weight)
    float_inputs = {name: _Meter(activations[name + INPUT].quantizer) for name in noisy_inputs}
    with hooked(
        {name: teacher.get_submodule(name) for name in noisy_inputs},
        lambda name, args, _: float_inputs[name].update(args[0], args[0]),
        before=True,
    ):
        run(teacher)
    return {
        "layers": rows,
        "weights": [_histograms(name, float_weights[name], weights[name]) for name in noisy_weights],
        "inputs": [_histograms(name, float_inputs[name], activations[name + INPUT]) for name in noisy_inputs],
    }


class _Meter:
    """Sums over the values that a quantizer rounds (signal, noise, clipped, count) and their histogram in codes."""

    def __init__(self, quantizer: Quantizer) -> None:
        margin = max(2.0, (quantizer.qmax - quantizer.qmin) / 4)
        self.quantizer = quantizer
        self.reach = (quantizer.qmin - margin, quantizer.qmax + margin)
        self.sums = [0.0, 0.0, 0.0, 0.0]
        self.counts = torch.zeros(BINS)

    def update(self, x: Tensor, quantized: Tensor) -> None:
        x, quantized = x.detach().float(), quantized.detach().float()
        shape = broadcast_shape(self.quantizer.num_channels, x.ndim, self.quantizer.channel_dim)
        codes = x / self.quantizer.scale.view(shape).to(x) + self.quantizer.zero_point.view(shape).to(x)
        outside = (codes < self.quantizer.qmin - 0.5) | (codes > self.quantizer.qmax + 0.5)
        new = (float(x.square().sum()), float((x - quantized).square().sum()), float(outside.sum()), x.numel())
        self.sums = [total + value for total, value in zip(self.sums, new, strict=True)]
        self.counts = self.counts + torch.histc(codes.clamp(*self.reach), BINS, *self.reach).cpu()


def _figures(role: str, meters: Sequence[_Meter]) -> dict[str, Any]:
    signal, noise, clipped, count = (sum(values) for values in zip(*(meter.sums for meter in meters), strict=True))
    snr_db = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    return {f"{role}_snr_db": snr_db, f"{role}_clipped": clipped / max(count, 1)}


def _histograms(name: str, before: _Meter, after: _Meter) -> dict[str, Any]:
    shares = {
        key: [round(float(share), 6) for share in meter.counts / meter.counts.sum().clamp(min=1)]
        for key, meter in (("before", before), ("after", after))
    }
    q = after.quantizer
    return {"layer": name, "bits": q.bits, "levels": [q.qmin, q.qmax], "reach": list(after.reach), **shares}


def _noisiest(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Names of the measured layers, lowest signal-to-noise ratio first."""
    return [row["name"] for row in sorted((row for row in rows if row.get(key) is not None), key=lambda row: row[key])]
