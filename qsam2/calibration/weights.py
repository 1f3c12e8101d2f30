"""Weight calibration: new weights for linear layers, of least quantized output error on held-out data.

Candidates of several strengths (`frobenius`: Q-SAM2's ridge, AHCQ-SAM's ACNR) are fitted on one half of the calibration
samples and compared on the other (ours).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.forward import encode, run_sample
from qsam2.calibration.frobenius import Spectrum, acnr, ridge
from qsam2.calibration.gram import LayerInputs, Moments, gather_inputs, gram_bytes
from qsam2.errors import UserError
from qsam2.layers.convert import nearest_names
from qsam2.output import listed
from qsam2.quantizers import Quantizer, build_quantizer
from qsam2.recipe.calibrate import FrobeniusRecipe, WeightCalibration
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import QuantizerSpec
from qsam2.run import Run

log = logging.getLogger("qsam2")


@dataclass(frozen=True)
class CalibratedLayer:
    """Result for one layer. Errors: E |difference of outputs|^2 over the outputs' variance, held-out half.

    `strength` is rho (frobenius) or the number of steps (acnr), 0 if the weights are unchanged.
    """

    name: str
    bits: int
    strength: float
    inputs: int
    rank: int
    """Rank of the inputs about their mean, on the fitted half."""
    condition_number: float
    std: tuple[float, float]
    """Standard deviation of the weights, before and after calibration."""
    max_over_std: tuple[float, float]
    float_error: float
    """Error of the float layer with the new weights."""
    quantized_error: tuple[float, float]
    """Error of the quantized layer with the old and the new weights, noise of quantized inputs included."""
    errors: dict[float, float]
    """Quantized error for each strength."""

    def figures(self) -> dict[str, Any]:
        """Values for `metrics.json`."""
        return {key: value for key, value in vars(self).items() if key != "name"}


def calibrate_weights(run: Run) -> None:
    """Stage: replace weights of linear layers by those of least quantized error on the calibration data, in place."""
    quantize, method = run.recipe.quantize, run.recipe.calibrate.weights
    if quantize is None or method is None:
        return
    layers, data = choose_layers(run.model, quantize, method.layers), run.calibration
    forward = encode if all(name.startswith("image_encoder.") for name in layers) else run_sample
    what = f"{method.method}, {len(layers)} layers, {gram_bytes(layers.values()) / 1e9:.2f} GB of Gram matrices"
    with run.folder.stage("calibrate weights", what):
        run.prepare_inference()
        shown = tqdm(data.samples(), "gather inputs", len(data), disable=run.silent)
        quantizers = input_quantizers(layers, quantize)
        inputs = gather_inputs(layers, lambda sample: forward(run.model, sample), shown, len(data), quantizers)
        rows = calibrate_layers(layers, inputs, quantize, method)
        calibrated = list(tqdm(rows, "calibrate weights", len(layers), disable=run.silent))
    changed = sum(row.strength > 0 for row in calibrated)
    log.info("%s: %d of %d layers have new weights", method.method, changed, len(calibrated))
    figures = {row.name: row.figures() for row in calibrated}
    run.folder.record("calibrated_weights", {"method": method.method, "layers": figures})


def choose_layers(model: nn.Module, quantize: QuantizeRecipe, patterns: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linear layers of a float model that match a pattern and whose weights the recipe quantizes.

    Raises:
        UserError: a pattern matches no linear layer, or none that is quantized.
    """
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    quantized = [name for name in linear if quantize.plan(name).weights is not None]
    for pattern in patterns:
        where = f"calibrate.weights.layers: {pattern!r} matches"
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise UserError(f"{where} no linear layer; {nearest_names(pattern, linear)}")
        if not any(fnmatchcase(name, pattern) for name in quantized):
            raise UserError(f"{where} only layers whose weights the recipe keeps in float: remove it, or their rule")
    return {name: linear[name] for name in quantized if any(fnmatchcase(name, pattern) for pattern in patterns)}


def input_quantizers(names: Iterable[str], quantize: QuantizeRecipe) -> dict[str, Quantizer]:
    """Quantizers for the inputs of layers, by name, if the recipe quantizes them."""
    specs = {name: quantize.plan(name).activations for name in names}
    return {
        name: build_quantizer(spec, "activation", name=f"{name}.input_quantizer")
        for name, spec in specs.items()
        if spec is not None
    }


def calibrate_layers(
    layers: Mapping[str, nn.Linear], inputs: dict[str, LayerInputs], quantize: QuantizeRecipe, method: WeightCalibration
) -> Iterator[CalibratedLayer]:
    """Replace weights and bias of each layer in place, see `calibrate_layer`. Empties `inputs`.

    Raises:
        UserError: a layer's weights hold NaN or infinity.
    """
    rows = []
    for name, layer in layers.items():
        spec = quantize.plan(name).weights
        assert spec is not None
        rows.append(calibrate_layer(name, layer, inputs.pop(name), spec, method))
        yield rows[-1]
    _report_singular(rows)


@torch.no_grad()
def calibrate_layer(
    name: str, layer: nn.Linear, inputs: LayerInputs, spec: QuantizerSpec, method: WeightCalibration
) -> CalibratedLayer:
    """Replace a layer's weights by the candidate (`ridge`, `acnr`) of least quantized error on the held-out half.

    Candidates are quantized by the recipe's spec of this layer. The error of quantized inputs counts as noise,
    uncorrelated between inputs and with them. The bias keeps the mean output on the fitted half; a layer without bias
    is fitted about zero. Strength 0 is a candidate, so that no layer gets worse on the held-out half.
    """
    device = inputs.fit.mean.device
    weight = layer.weight.detach().to(device).double()
    if not weight.isfinite().all():
        raise UserError(f"weight of {name} contains NaN or infinity: check the checkpoint")
    spectrum = Spectrum.of(inputs.fit, centred=layer.bias is not None)
    strengths = method.strengths
    if isinstance(method, FrobeniusRecipe):
        candidates = ridge(weight, spectrum, strengths)
    else:
        candidates = acnr(weight, inputs.noise, strengths)

    held_out, scale = inputs.held_out, output_energy(weight, inputs.held_out, layer.bias is not None)
    quantizer = build_quantizer(spec, "weight", num_channels=layer.out_features, name=f"{name}.weight_quantizer")
    errors = []
    for candidate in candidates:
        shift = refit_bias(weight, candidate, inputs.fit.mean, layer.bias)
        quantized = _quantize(quantizer, candidate)
        noise = float(quantized.square().sum(dim=0) @ inputs.noise)
        errors.append((output_error(weight - quantized, shift, held_out) + noise) / scale)
    best = min(range(len(errors)), key=errors.__getitem__)  # the weakest among equals
    new = candidates[best]
    shift = refit_bias(weight, new, inputs.fit.mean, layer.bias)
    row = CalibratedLayer(
        name=name,
        bits=spec.bits,
        strength=strengths[best],
        inputs=layer.in_features,
        rank=spectrum.rank,
        condition_number=spectrum.condition_number,
        std=(float(weight.std()), float(new.std())),
        max_over_std=(_max_over_std(weight), _max_over_std(new)),
        float_error=output_error(weight - new, shift, held_out) / scale,
        quantized_error=(errors[0], errors[best]),
        errors=dict(zip(strengths, errors, strict=True)),
    )
    layer.weight.copy_(new)
    if layer.bias is not None:
        layer.bias.add_(shift.to(layer.bias.device, layer.bias.dtype))
    return row


def refit_bias(weight: Tensor, new: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    """Change (m,) of the bias that keeps the mean output, (W - W^) mean; 0 without a bias."""
    shift = (weight - new) @ mean
    return shift if bias is not None else torch.zeros_like(shift)


def output_error(difference: Tensor, shift: Tensor, moments: Moments) -> float:
    """E |D x - shift|^2 from the moments of x: tr(D C D^T) + |D mean - shift|^2. D is (m, n)."""
    spread = ((difference @ moments.covariance) * difference).sum()
    return float(spread + (difference @ moments.mean - shift).square().sum())


def output_energy(weight: Tensor, moments: Moments, centred: bool) -> float:
    """E |W x|^2, about the mean or about zero; 1 if that is 0, so that errors can be relative to it."""
    mean = weight @ moments.mean if centred else weight.new_zeros(len(weight))
    return output_error(weight, mean, moments) or 1.0


def _quantize(quantizer: Quantizer, weight: Tensor) -> Tensor:
    single = weight.float()
    quantizer.to(single.device).initialize_from(single)
    return quantizer(single).double()


def _report_singular(rows: Sequence[CalibratedLayer]) -> None:
    # the output of a LayerNorm always lacks one direction
    singular = [f"{row.name} {row.rank} of {row.inputs}" for row in rows if row.rank < row.inputs - 1]
    if singular:
        log.warning(
            "the inputs of %d layers vary in few directions on the calibration data (%s): more clips may help",
            *(len(singular), listed(singular)),
        )


def _max_over_std(weight: Tensor) -> float:
    std = float(weight.std())
    return float(weight.abs().max()) / std if std else 0.0
