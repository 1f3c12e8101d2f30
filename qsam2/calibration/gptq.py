"""GPTQ (arXiv 2210.17323): columns of a weight are rounded one by one, and later columns compensate their errors.

The integers of a calibrated model's weights are chosen for least output error E |(W - Q) x|^2 instead of least
distance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.activation_ranges import in_image_encoder
from qsam2.calibration.forward import encode, run_sample
from qsam2.calibration.gram import LayerInputs, gather_inputs
from qsam2.calibration.weights import output_energy, output_error, refit_bias
from qsam2.data.calibration_data import CalibrationData
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
class RoundedLayer:
    """Result for one layer. Errors: E |difference of outputs|^2 over the outputs' variance, held-out half."""

    bits: int
    inputs: int
    error: tuple[float, float]
    """Error of the nearest integers, and of the chosen ones."""


def round_weights(run: Run) -> None:
    """Stage: round quantized weights to integers of least output error, in place."""
    method = run.recipe.calibrate.rounding
    if run.recipe.quantize is None or method is None:
        return
    with run.folder.stage("round weights", method.method):
        rows = round_sam2(run.model, run.calibration, method.damping, progress=not run.silent)
    better = sum(row.error[1] < row.error[0] for row in rows.values())
    log.info("%s: %d of %d layers have other integers than the nearest", method.method, better, len(rows))
    run.folder.record("rounded", {"method": method.method, "layers": {name: vars(row) for name, row in rows.items()}})


def rounded_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers that GPTQ rounds: linear layers and convolutions without groups; others keep nearest integers."""
    return {
        name: layer
        for name, layer, _ in quantized_weights(model)
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def round_sam2(model: SAM2, data: CalibrationData, damping: float, *, progress: bool = True) -> dict[str, RoundedLayer]:
    """Round the layers of a calibrated SAM2 in two passes: the image encoder, then all others, with it rounded.

    Inputs are those of the quantized model, except that weights of the same pass are still in float: rounded weights
    will be nearer to them than to their nearest integers (ours; GPTQ has one pass per block).
    """
    layers = rounded_layers(model)
    rows: dict[str, RoundedLayer] = {}
    for what, encoder in (("image encoder", True), ("other layers", False)):
        part = {name: layer for name, layer in layers.items() if in_image_encoder(name) is encoder}
        if not part:
            continue
        forward = encode if encoder else run_sample
        samples, count = (data.samples(), len(data)) if encoder else (data.clip_samples(), len(data.clips))
        weights = [quantizer for name, _, quantizer in quantized_weights(model) if name in part]
        for quantizer in weights:
            quantizer.state = QuantizerState.FLOAT
        shown = tqdm(samples, f"gather inputs, {what}", count, disable=not progress)
        inputs = gather_inputs(part, partial(forward, model), shown, count)
        for quantizer in weights:
            quantizer.state = QuantizerState.QUANTIZE
        for name, layer in tqdm(part.items(), f"gptq, {what}", disable=not progress):
            rows[name] = round_layer(name, layer, inputs.pop(name), damping)
    return rows


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
    shape = broadcast_shape(quantizer.num_channels, 2, 0)
    scale, zero_point = (
        value.view(shape).expand(len(weight), 1).to(weight) for value in (quantizer.scale, quantizer.zero_point)
    )
    low, high, mid_rise = quantizer.qmin - zero_point, quantizer.qmax - zero_point, quantizer.grid.mid_rise

    def to_grid(columns: Tensor) -> Tensor:
        return to_levels(columns, scale, low, high, mid_rise) * scale

    nearest = to_grid(weight)
    fitted = gptq(weight, inputs.fit.second_moment(centred=bias is not None), to_grid, damping, inputs.noise)
    if fitted is None:
        raise UserError(
            f"calibrate.rounding.damping={damping}: the Gram matrix of {name} is singular with it, raise it (0.01 is "
            "usual) or give more samples"
        )
    shift = refit_bias(weight, fitted, inputs.fit.mean, bias)
    held_out, energy = inputs.held_out, output_energy(weight, inputs.held_out, bias is not None)
    errors = [
        (output_error(weight - rounded, moved, held_out) + float(rounded.square().sum(dim=0) @ inputs.noise)) / energy
        for rounded, moved in ((nearest, torch.zeros_like(shift)), (fitted, shift))
    ]
    better = errors[1] < errors[0]
    rounded = fitted if better else nearest
    codes = quantizer.to_int(rounded.view_as(layer.weight).to(layer.weight))
    layer.weight.copy_(quantizer.dequantize(codes, layer.weight.dtype))
    if better and bias is not None:
        bias.add_(shift.to(bias.device, bias.dtype))
    return RoundedLayer(quantizer.bits, weight.shape[1], (errors[0], min(errors)))


def gptq(
    weight: Tensor, moment: Tensor, to_grid: Callable[[Tensor], Tensor], damping: float, noise: Tensor | None = None
) -> Tensor | None:
    """Values on the grid, (m, n), of a weight (m, n) float64; None where the damped Hessian is singular.

    Algorithm 1: with U the upper Cholesky factor of the inverse of the Hessian H + damping * mean diag H, column j is
    rounded, and its error over U_jj times row j of U is subtracted from the later columns. Columns of large energy come
    first, while many others can compensate them (the authors' code). U is computed without the inverse (ours): it is
    R^-1 for H = R R^T, R upper triangular. Inputs that are all zero give the nearest values. With noise n (n,) of the
    inputs, H is C + diag n, and W (C + diag n)^-1 C is rounded instead of W (ours), the minimiser of
    E |W x - Q (x + e)|^2. `to_grid` gives the nearest values on the grid for columns (m, k).
    """
    noise = torch.zeros_like(moment[0]) if noise is None else noise
    energy = (moment.diagonal() + noise).mean()
    if not energy > 0:
        return to_grid(weight)
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
            rounded = to_grid(column)
            errors[:, j : j + 1] = (column - rounded) / own[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * own[j, j + 1 :]
            column.copy_(rounded)
        rest[:, start + BLOCK :] -= errors @ factor[start : start + BLOCK, start + BLOCK :]
    return rest[:, order.argsort()]
