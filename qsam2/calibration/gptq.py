"""GPTQ (arXiv 2210.17323): columns of a weight are rounded one by one, and later columns compensate their errors.

The integers of a calibrated model's weights are chosen for least output error E |(W - Q) x|^2 instead of least
distance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.activation_ranges import in_image_encoder
from qsam2.calibration.forward import encode, run_sample
from qsam2.calibration.gram import LayerInputs, Moments, gather_inputs
from qsam2.calibration.weights import output_energy, output_error, refit_bias
from qsam2.data.calibration_data import CalibrationData, Sample
from qsam2.errors import UserError
from qsam2.layers.convert import quantized_weights
from qsam2.layers.weight import QuantizedLayer
from qsam2.models import SAM2
from qsam2.quantizers import QuantizerState
from qsam2.quantizers.fake_quant import broadcast_shape
from qsam2.quantizers.passes import to_levels
from qsam2.run import Run

log = logging.getLogger("qsam2")
BLOCK = 128
"""Columns whose errors are passed on to the later columns in one product."""


@dataclass(frozen=True)
class RowGrid:
    """Levels of each row of a weight (m, n): `low` .. `high` steps of `scale`, all (m, 1) float64."""

    scale: Tensor
    low: Tensor
    high: Tensor
    mid_rise: bool

    @classmethod
    def of(cls, layer: QuantizedLayer, device: torch.device) -> RowGrid:
        """Grid of a layer's weight quantizer, for any method."""
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        shape = broadcast_shape(quantizer.num_channels, 2, 0)
        scale, zero_point = (
            value.view(shape).expand(len(layer.weight), 1).to(device).double()
            for value in (quantizer.scale, quantizer.zero_point)
        )
        return cls(scale, quantizer.qmin - zero_point, quantizer.qmax - zero_point, quantizer.grid.mid_rise)

    def nearest(self, weight: Tensor) -> Tensor:
        """Nearest values on the grid, for any columns of the weight."""
        return to_levels(weight, self.scale, self.low, self.high, self.mid_rise) * self.scale


@dataclass(frozen=True)
class RoundedLayer:
    """Result for one layer. Errors: E |difference of outputs|^2 over the outputs' variance, held-out half."""

    name: str
    bits: int
    inputs: int
    error: tuple[float, float]
    """Error of the nearest integers, and of the chosen ones."""

    def figures(self) -> dict[str, Any]:
        """Values for `metrics.json`."""
        return {key: value for key, value in vars(self).items() if key != "name"}


def round_weights(run: Run) -> None:
    """Stage: round quantized weights to integers of least output error, in place."""
    method = run.recipe.calibrate.rounding
    if run.recipe.quantize is None or method is None:
        return
    with run.folder.stage("round weights", method.method):
        rows = round_sam2(run.model, run.calibration, method.damping, progress=not run.silent)
    better = sum(row.error[1] < row.error[0] for row in rows)
    log.info("%s: %d of %d layers have other integers than the nearest", method.method, better, len(rows))
    run.folder.record("rounded", {"method": method.method, "layers": {row.name: row.figures() for row in rows}})


def rounded_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers that GPTQ rounds: linear layers and convolutions without groups; others keep nearest integers."""
    return {
        name: layer
        for name, layer, _ in quantized_weights(model)
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def round_sam2(model: SAM2, data: CalibrationData, damping: float, *, progress: bool = True) -> list[RoundedLayer]:
    """Round the layers of a calibrated SAM2 in two passes: the image encoder, then all others, with it rounded.

    Inputs are those of the quantized model, except that weights of the same pass are still in float: rounded weights
    will be nearer to them than to their nearest integers (ours; GPTQ has one pass per block).
    """
    layers = rounded_layers(model)
    rows: list[RoundedLayer] = []
    passes: tuple[tuple[str, bool, Callable[[Sample], object], Iterator[Sample], int], ...] = (
        ("image encoder", True, lambda sample: encode(model, sample), data.samples(), len(data)),
        ("other layers", False, lambda sample: run_sample(model, sample), data.clip_samples(), len(data.clips)),
    )
    for what, encoder, run, samples, count in passes:
        part = {name: layer for name, layer in layers.items() if in_image_encoder(name) is encoder}
        if part:
            shown = tqdm(samples, f"gather inputs, {what}", count, disable=not progress)
            _set_states(part, QuantizerState.FLOAT)
            inputs = gather_inputs(part, run, shown, count)
            _set_states(part, QuantizerState.QUANTIZE)
            rounded = round_layers(part, inputs, damping)
            rows += tqdm(rounded, f"gptq, {what}", len(part), disable=not progress)
    return rows


def _set_states(layers: Mapping[str, QuantizedLayer], state: QuantizerState) -> None:
    for layer in layers.values():
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.state = state


def round_layers(
    layers: Mapping[str, QuantizedLayer], inputs: dict[str, LayerInputs], damping: float
) -> Iterator[RoundedLayer]:
    """Round each layer in place, see `round_layer`. Empties `inputs`."""
    for name, layer in layers.items():
        yield round_layer(name, layer, inputs.pop(name), damping)


@torch.no_grad()
def round_layer(name: str, layer: QuantizedLayer, inputs: LayerInputs, damping: float) -> RoundedLayer:
    """Freeze the weight's quantizer and round the weight to integers of least output error, in place.

    The weight becomes its dequantized integers, which finalizing, packing and further rounding leave unchanged. Ours:
    the bias compensates the change of the mean output, so that the Hessian is the covariance of the inputs (without a
    bias: their second moment). The error of quantized inputs is treated as noise, uncorrelated between inputs and with
    them, as in `calibrate_layer`: GPTQ then rounds the weights that are best for noisy inputs. Integers are fitted on
    one half of the inputs; if the nearest are better on the other half, these are kept.

    Raises:
        UserError: the Hessian with this damping is singular.
    """
    quantizer, bias = layer.weight_quantizer, getattr(layer, "bias", None)
    assert quantizer is not None
    quantizer.freeze(layer.weight)  # applies the method's transform to the weight
    weight = layer.weight.detach().flatten(1).to(inputs.fit.mean.device).double()
    grid = RowGrid.of(layer, weight.device)
    nearest = grid.nearest(weight)
    fitted = gptq(weight, second_moment(inputs.fit, centred=bias is not None), grid, damping, inputs.noise)
    if fitted is None:
        raise UserError(
            f"calibrate.rounding.damping={damping}: the Gram matrix of {name} is singular with it, raise it (0.01 is "
            "usual) or give more samples"
        )
    shift = refit_bias(weight, fitted, inputs.fit.mean, bias)
    held_out, scale = inputs.held_out, output_energy(weight, inputs.held_out, bias is not None)
    errors = [
        (output_error(weight - rounded, moved, held_out) + float(rounded.square().sum(dim=0) @ inputs.noise)) / scale
        for rounded, moved in ((nearest, torch.zeros_like(shift)), (fitted, shift))
    ]
    better = errors[1] < errors[0]
    rounded = fitted if better else nearest
    codes = quantizer.to_int(rounded.view_as(layer.weight).to(layer.weight))
    layer.weight.copy_(quantizer.dequantize(codes, layer.weight.dtype))
    if better and bias is not None:
        bias.add_(shift.to(bias.device, bias.dtype))
    return RoundedLayer(name, quantizer.bits, weight.shape[1], (errors[0], min(errors)))


def second_moment(moments: Moments, *, centred: bool) -> Tensor:
    """Second moment (n, n) of the inputs, about their mean or about zero."""
    return moments.covariance if centred else moments.covariance + torch.outer(moments.mean, moments.mean)


def gptq(weight: Tensor, moment: Tensor, grid: RowGrid, damping: float, noise: Tensor | None = None) -> Tensor | None:
    """Values on the grid, (m, n), of a weight (m, n) float64; None where the damped Hessian is singular.

    Algorithm 1: with U the upper Cholesky factor of the inverse of the Hessian H + damping * mean diag H, column j is
    rounded, and its error over U_jj times row j of U is subtracted from the later columns. Columns of large energy come
    first, while many others can compensate them (the authors' code). U is computed without the inverse (ours): it is
    R^-1 for H = R R^T, R upper triangular. Inputs that are all zero give the nearest values. With noise n (n,) of the
    inputs, H is C + diag n, and W (C + diag n)^-1 C is rounded instead of W (ours), the minimiser of
    E |W x - Q (x + e)|^2.
    """
    noise = torch.zeros_like(moment[0]) if noise is None else noise
    energy = (moment.diagonal() + noise).mean()
    if not energy > 0:
        return grid.nearest(weight)
    order = (moment.diagonal() + noise).argsort(descending=True)
    hessian = moment[order][:, order]
    hessian.diagonal().add_(noise[order] + damping * energy)
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        return None
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)

    rest = weight[:, order]
    rest = rest - (rest * noise[order]) @ factor.T @ factor
    for start in range(0, rest.shape[1], BLOCK):
        block, own = rest[:, start : start + BLOCK], factor[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            column = block[:, j : j + 1]
            rounded = grid.nearest(column)
            errors[:, j : j + 1] = (column - rounded) / own[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * own[j, j + 1 :]
            column.copy_(rounded)
        rest[:, start + BLOCK :] -= errors @ factor[start : start + BLOCK, start + BLOCK :]
    return rest[:, order.argsort()]
