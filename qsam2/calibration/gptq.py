"""Rounding of a calibrated model's weights to integers of least output error E |W x - Q q|^2, not of least distance.

GPTQ (arXiv 2210.17323): columns of a weight are rounded one by one, and later columns compensate their errors. Ours: x
and the quantized inputs q have moments of their own, the damping is chosen per layer on held-out data, and the bias
keeps the mean output, that of the nearest integers included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.activation_ranges import in_image_encoder
from qsam2.calibration.forward import encode, run_sample
from qsam2.calibration.gram import LayerInputs, Moments, gather_inputs
from qsam2.calibration.smooth import norms_and_readers
from qsam2.calibration.weights import output_energy, output_error, refit_bias
from qsam2.data.calibration_data import CalibrationData
from qsam2.errors import UserError
from qsam2.layers.convert import quantized_weights
from qsam2.layers.weight import QuantizedLayer
from qsam2.models import SAM2
from qsam2.quantizers import QuantizerState
from qsam2.quantizers.fake_quant import broadcast_shape
from qsam2.quantizers.passes import to_levels
from qsam2.recipe.calibrate import GPTQRecipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.run import Run

log = logging.getLogger("qsam2")
BLOCK = 128
"""Columns whose errors are passed on to the later columns in one product."""
BATCH_BYTES = 2**28
"""Most bytes of Hessians that are factored at a time, one per damping; of a large layer one after another."""
MARGIN = 1 / 16
"""Distance, in steps, that a weight which is trained on keeps from the edge of its integer's cell."""


@dataclass(frozen=True)
class RoundedLayer:
    """Result for one layer. Errors: E |difference of outputs|^2 over the outputs' variance, held-out half."""

    bits: int
    inputs: int
    error: tuple[float, float]
    """Error of the nearest integers with the bias as it was, and of the best that were fitted on the other half."""
    damping: float
    """Damping of the chosen integers, 0 for the nearest."""


@dataclass(frozen=True)
class FloatLayer:
    """Weight and bias of the float layer that a quantized one is to follow."""

    weight: Tensor
    bias: Tensor | None


def round_weights(run: Run) -> None:
    """Stage: round quantized weights to integers of least output error, in place.

    In a run that trains, weights stay in float, within the cells of these integers.
    """
    quantize, method = run.recipe.quantize, run.recipe.calibrate.rounding
    if quantize is None or method is None:
        return
    assert run.teacher is not None
    dampings = method.damping if isinstance(method, GPTQRecipe) else ()
    with run.folder.stage("round weights", method.method):
        run.prepare_inference()
        targets = float_layers(run.model, run.teacher, quantize)
        trains = run.recipe.train is not None
        rows = round_sam2(run.model, run.calibration, targets, dampings, trains=trains, progress=not run.silent)
    better = sum(row.damping > 0 for row in rows.values())
    log.info("%s: %d of %d layers have other integers than the nearest", method.method, better, len(rows))
    run.folder.record("rounded", {"method": method.method, "layers": {name: vars(row) for name, row in rows.items()}})


def rounded_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers that are rounded: linear layers and convolutions without groups; others keep nearest integers."""
    return {
        name: layer
        for name, layer, _ in quantized_weights(model)
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


@torch.no_grad()
def float_layers(model: SAM2, teacher: SAM2, quantize: QuantizeRecipe) -> dict[str, FloatLayer]:
    """The teacher's layers behind `rounded_layers`, with the scales that smoothing has moved into their columns."""
    scales: dict[str, Tensor] = {}
    for norm, readers in norms_and_readers(model, quantize).items():
        before, after = (each.get_submodule(norm).get_parameter("weight") for each in (teacher, model))
        scales |= dict.fromkeys(readers, torch.where(before == after, 1.0, before / after))
    layers = {}
    for name in rounded_layers(model):
        layer = teacher.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        layers[name] = FloatLayer(weight * scales[name] if name in scales else weight, layer._parameters["bias"])
    return layers


def round_sam2(
    model: SAM2,
    data: CalibrationData,
    targets: Mapping[str, FloatLayer],
    dampings: Sequence[float],
    *,
    trains: bool = False,
    progress: bool = True,
) -> dict[str, RoundedLayer]:
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
        originals = {name: targets[name].weight for name in part}
        inputs = gather_inputs(part, partial(forward, model), shown, count, weights=originals)
        for quantizer in weights:
            quantizer.state = QuantizerState.QUANTIZE
        for name, layer in tqdm(part.items(), f"round, {what}", disable=not progress):
            rows[name] = round_layer(name, layer, inputs.pop(name), targets[name], dampings, trains=trains)
    return rows


@torch.no_grad()
def round_layer(
    name: str,
    layer: QuantizedLayer,
    inputs: LayerInputs,
    target: FloatLayer,
    dampings: Sequence[float],
    *,
    trains: bool = False,
) -> RoundedLayer:
    """Round a layer's weight to integers of least output error, in place, and freeze its quantizer.

    The weight becomes its dequantized integers, which finalizing, packing and further rounding leave unchanged. One
    that is trained on (`trains`) is clamped into the cells of its integers instead, and its quantizer is not frozen.
    The bias compensates the change of the mean output; without one, moments are about zero. Integers of each damping
    are fitted on one half of the inputs. The damping that is best on the other half, if not the nearest integers are,
    then has its integers fitted on both.

    Raises:
        UserError: the Hessian is singular with every damping.
    """
    quantizer, bias = layer.weight_quantizer, getattr(layer, "bias", None)
    assert quantizer is not None
    if not trains:
        quantizer.freeze(layer.weight)  # applies the method's transform to the weight
    fit, held_out = inputs.fit, inputs.held_out
    weight, original = (each.detach().flatten(1).to(fit.mean) for each in (layer.weight, target.weight))
    moved = torch.zeros_like(weight[:, 0])  # since calibration of the weights, as seen from the float layer
    if bias is not None and target.bias is not None:
        moved = (bias - target.bias).to(moved)
    shape = broadcast_shape(quantizer.num_channels, 2, 0)
    scale, zero_point = (
        value.view(shape).expand(len(weight), 1).to(weight) for value in (quantizer.scale, quantizer.zero_point)
    )
    low, high, mid_rise = quantizer.qmin - zero_point, quantizer.qmax - zero_point, quantizer.grid.mid_rise

    def to_grid(columns: Tensor) -> Tensor:
        return to_levels(columns, scale, low, high, mid_rise) * scale

    def fitted(moments: Moments, dampings: Sequence[float]) -> list[Tensor | None]:
        moment, cross = (each(centred=bias is not None) for each in (moments.second_moment, moments.cross_moment))
        return gptq(weight, moment, to_grid, dampings, original @ cross)

    nearest, of_half = to_grid(weight), fitted(fit, dampings)
    if dampings and all(found is None for found in of_half):
        raise UserError(
            f"calibrate.rounding.damping={', '.join(map(str, dampings))}: the Gram matrix of {name} is singular with "
            "them, give larger ones (0.01 is usual) or more samples"
        )
    candidates = [(0.0, nearest, moved)]
    for damping, found in zip((0.0, *dampings), (nearest, *of_half), strict=True):
        if found is not None:
            candidates.append((damping, found, refit_bias(original, found, fit, bias)))
    energy = output_energy(original, held_out, bias is not None)
    errors = [output_error(original, found, shift, held_out) / energy for _, found, shift in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    damping, rounded, shift = candidates[best]
    if best:
        whole = inputs.whole
        again = fitted(whole, (damping,))[0] if damping else None
        rounded = rounded if again is None else again
        shift = refit_bias(original, rounded, whole, bias)
    if trains:
        level, edge = rounded / scale, (0.5 - MARGIN) * scale
        lower = torch.where(level <= low, -torch.inf, rounded - edge)
        upper = torch.where(level >= high, torch.inf, rounded + edge)
        layer.weight.copy_(weight.clamp(lower, upper).view_as(layer.weight))
    else:
        codes = quantizer.to_int(rounded.view_as(layer.weight).to(layer.weight))
        layer.weight.copy_(quantizer.dequantize(codes, layer.weight.dtype))
    if bias is not None:
        bias.add_((shift - moved).to(bias.device, bias.dtype))
    return RoundedLayer(quantizer.bits, weight.shape[1], (errors[0], errors[best]), damping)


def gptq(
    weight: Tensor,
    moment: Tensor,
    to_grid: Callable[[Tensor], Tensor],
    dampings: Sequence[float],
    target: Tensor | None = None,
) -> list[Tensor | None]:
    """Values on the grid, (m, n), of a weight (m, n) float64 for each damping; None where the Hessian is singular.

    Algorithm 1: with U the upper Cholesky factor of the inverse of the Hessian H = `moment` + damping * its mean
    diagonal, column j is rounded, and its error over U_jj times row j of U is subtracted from the later columns.
    Columns of large energy come first, while many others can compensate them (the authors' code). U is computed
    without the inverse (ours): it is R^-1 for H = R R^T, R upper triangular. Inputs that are all zero give the nearest
    values.

    Args:
        moment: E q q^T of what the layer reads, (n, n).
        to_grid: Nearest values on the grid for columns (..., m, k).
        target: E y q^T of the outputs y that are wanted, (m, n); default those of the weight. What is rounded is the
            minimiser of E |y - V q|^2 + lambda |V - W|^2 (ours), lambda the damping times the mean diagonal.
    """
    energy = moment.diagonal().mean()
    if not energy > 0 or not dampings:
        return [to_grid(weight) for _ in dampings]
    together = max(BATCH_BYTES // moment.nbytes, 1)
    if len(dampings) > together:
        parts = (dampings[start : start + together] for start in range(0, len(dampings), together))
        return [found for part in parts for found in gptq(weight, moment, to_grid, part, target)]
    order = moment.diagonal().argsort(descending=True)
    hessian = moment[order][:, order].repeat(len(dampings), 1, 1)
    hessian.diagonal(dim1=1, dim2=2).add_(energy * torch.tensor(dampings).to(energy)[:, None])
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(1, 2))
    lower[failed > 0] = torch.eye(len(moment)).to(lower)
    identity = torch.eye(len(moment)).to(lower).expand_as(lower)
    factor = torch.linalg.solve_triangular(lower.flip(1, 2), identity, upper=True)  # (dampings, n, n)

    rest = weight[:, order].repeat(len(dampings), 1, 1)
    if target is not None:
        rest += ((target - weight @ moment)[:, order] @ factor.mT) @ factor
    for start in range(0, len(moment), BLOCK):
        stop = start + BLOCK
        block, own = rest[..., start:stop], factor[:, start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(block.shape[-1]):
            column = block[..., j : j + 1]
            rounded = to_grid(column)
            errors[..., j : j + 1] = (column - rounded) / own[:, j : j + 1, j : j + 1]
            block[..., j + 1 :] -= errors[..., j : j + 1] * own[:, j : j + 1, j + 1 :]
            column.copy_(rounded)
        rest[..., stop:] -= errors @ factor[:, start:stop, stop:]
    found = rest[..., order.argsort()]
    return [None if bad else values for bad, values in zip(failed.tolist(), found, strict=True)]
