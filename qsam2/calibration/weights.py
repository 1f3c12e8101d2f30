"""Weight calibration: new weights for linear layers, of least quantized output error on held-out data.

`ridge` (Q-SAM2, arXiv 2506.09782) lessens the Frobenius norm where the inputs hardly vary, and makes up for the error
of quantized inputs (ours); `acnr` (AHCQ-SAM) raises small singular values. Candidates of several strengths are fitted
on one half of the calibration samples and compared on the other (ours).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.forward import encode, run_sample
from qsam2.calibration.gram import LayerInputs, Moments, gather_inputs, gram_bytes, observe_inputs
from qsam2.errors import UserError
from qsam2.layers.convert import nearest_names
from qsam2.output import listed
from qsam2.quantizers import build_quantizer
from qsam2.recipe.calibrate import FrobeniusRecipe, WeightCalibration
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import QuantizerSpec
from qsam2.run import Run

log = logging.getLogger("qsam2")
ROUNDING = 1e-13
"""Eigenvalues below this share of the largest are zero up to the rounding of float32 inputs."""
PULL = 0.003
"""The paper's lambda: strength of the pull of singular values to their mean."""
DAMPING = 0.001
"""The paper's beta: strength of the damping by the activations' quantization error."""
LEADING = 0.8
"""Share of the energy whose singular values stay unchanged."""


@dataclass(frozen=True)
class CalibratedLayer:
    """Result for one layer. Errors: E |difference of outputs|^2 over the outputs' variance, held-out half.

    `strength` is rho (frobenius) or the number of steps (acnr), 0 if the weights are unchanged.
    """

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
    """Error of the new weights in float, which read quantized inputs."""
    quantized_error: tuple[float, float]
    """Error of the quantized layer with the old and the new weights."""
    errors: dict[float, float]
    """Quantized error for each strength."""


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
        passed = partial(forward, run.model)
        half, whole = (
            tqdm(data.samples(), what, count, disable=run.silent)
            for what, count in (("ranges of inputs", max(len(data), 2) // 2), ("gather inputs", len(data)))
        )
        quantizers = observe_inputs(layers, passed, half, len(data), quantize)
        inputs = gather_inputs(layers, passed, whole, len(data), quantizers)
        calibrated = calibrate_layers(layers, inputs, quantize, method, progress=not run.silent)
    changed = sum(row.strength > 0 for row in calibrated.values())
    log.info("%s: %d of %d layers have new weights", method.method, changed, len(calibrated))
    figures = {name: vars(row) for name, row in calibrated.items()}
    run.folder.record("calibrated_weights", {"method": method.method, "layers": figures})


def choose_layers(model: nn.Module, quantize: QuantizeRecipe, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """Linear layers of a float model that the recipe quantizes, by patterns; raises as `choose_quantized`."""
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    quantized = {name: quantize.plan(name).weights is not None for name in linear}
    chosen = choose_quantized("calibrate.weights.layers", patterns, quantized, "linear layer", "layers")
    return {name: linear[name] for name in chosen}


def choose_quantized(
    key: str, patterns: Sequence[str], quantized: Mapping[str, bool], one: str, several: str
) -> list[str]:
    """Names that match one of a recipe key's patterns and whose weights are quantized, in order.

    Raises:
        UserError: a pattern matches no name, or none whose weights are quantized.
    """
    for pattern in patterns:
        matched = [name for name in quantized if fnmatchcase(name, pattern)]
        where = f"{key}: {pattern!r} matches"
        if not matched:
            raise UserError(f"{where} no {one}; {nearest_names(pattern, quantized)}")
        if not any(quantized[name] for name in matched):
            raise UserError(f"{where} only {several} whose weights the recipe keeps in float: remove it, or their rule")
    return [name for name in quantized if quantized[name] and any(fnmatchcase(name, p) for p in patterns)]


def calibrate_layers(
    layers: Mapping[str, nn.Linear],
    inputs: dict[str, LayerInputs],
    quantize: QuantizeRecipe,
    method: WeightCalibration,
    *,
    progress: bool = True,
) -> dict[str, CalibratedLayer]:
    """Replace weights and bias of each layer in place, see `calibrate_layer`. Empties `inputs`."""
    rows = {}
    for name, layer in tqdm(layers.items(), "calibrate weights", disable=not progress):
        spec = quantize.plan(name).weights
        assert spec is not None
        rows[name] = calibrate_layer(name, layer, inputs.pop(name), spec, method)
    # the output of a LayerNorm always lacks one direction
    singular = [f"{name} {row.rank} of {row.inputs}" for name, row in rows.items() if row.rank < row.inputs - 1]
    if singular:
        log.warning(
            "the inputs of %d layers vary in few directions on the calibration data (%s): more clips may help",
            *(len(singular), listed(singular)),
        )
    return rows


@torch.no_grad()
def calibrate_layer(
    name: str, layer: nn.Linear, inputs: LayerInputs, spec: QuantizerSpec, method: WeightCalibration
) -> CalibratedLayer:
    """Replace a layer's weights by the candidate (`ridge`, `acnr`) of least quantized error on the held-out half.

    Candidates are quantized by the recipe's spec of this layer and read quantized inputs. The bias keeps the mean
    output; a layer without bias is fitted about zero. Strength 0 is a candidate, so that no layer gets worse on the
    held-out half. The best is then fitted on both halves.

    Raises:
        UserError: the weights hold NaN or infinity.
    """
    device = inputs.fit.mean.device
    weight = layer.weight.detach().to(device).double()
    if not weight.isfinite().all():
        raise UserError(f"weight of {name} contains NaN or infinity: check the checkpoint")
    centred, strengths = layer.bias is not None, method.strengths

    def fitted(moments: Moments, strengths: Sequence[float]) -> tuple[list[Tensor], Spectrum]:
        spectrum = Spectrum(moments, centred=centred)
        if isinstance(method, FrobeniusRecipe):
            return ridge(weight, spectrum, strengths, moments.cross_moment(centred=centred)), spectrum
        return acnr(weight, moments.noise, strengths), spectrum

    candidates, spectrum = fitted(inputs.fit, strengths)
    held_out, energy = inputs.held_out, output_energy(weight, inputs.held_out, centred)
    quantizer = build_quantizer(spec, "weight", num_channels=layer.out_features, name=f"{name}.weight_quantizer")
    errors = []
    for candidate in candidates:
        single = candidate.float()
        quantizer.to(single.device).initialize_from(single)
        quantized = quantizer(single).double()
        shift = refit_bias(weight, quantized, inputs.fit, layer.bias)
        errors.append(output_error(weight, quantized, shift, held_out) / energy)
    best = min(range(len(errors)), key=errors.__getitem__)  # the weakest among equals
    shift = refit_bias(weight, candidates[best], inputs.fit, layer.bias) if best else torch.zeros_like(weight[:, 0])
    float_error = output_error(weight, candidates[best], shift, held_out) / energy
    if best:
        whole = inputs.whole
        (new,), _ = fitted(whole, strengths[best : best + 1])
        shift = refit_bias(weight, new, whole, layer.bias)
    else:
        new = weight
    row = CalibratedLayer(
        bits=spec.bits,
        strength=strengths[best],
        inputs=layer.in_features,
        rank=spectrum.rank,
        condition_number=spectrum.condition_number,
        std=(float(weight.std()), float(new.std())),
        max_over_std=(_max_over_std(weight), _max_over_std(new)),
        float_error=float_error,
        quantized_error=(errors[0], errors[best]),
        errors=dict(zip(strengths, errors, strict=True)),
    )
    layer.weight.copy_(new)
    if layer.bias is not None:
        layer.bias.add_(shift.to(layer.bias.device, layer.bias.dtype))
    return row


class Spectrum:
    """Eigenvalues (n,) ascending and eigenvectors (n, n) of a layer's second moment (`Moments.second_moment`)."""

    def __init__(self, moments: Moments, *, centred: bool) -> None:
        values, self.vectors = torch.linalg.eigh(moments.second_moment(centred=centred))
        self.values = values.clamp(min=0)
        # the scatter of a constant input is the rounding of its mean
        least = ROUNDING * torch.maximum(self.values[-1], ROUNDING * moments.mean.square().sum())
        self.rank = int((self.values > least).sum())

    @property
    def condition_number(self) -> float:
        """Ratio of the largest eigenvalue to the smallest above zero; 1 if there is none."""
        return float(self.values[-1] / self.values[-self.rank]) if self.rank else 1.0


def ridge(weight: Tensor, spectrum: Spectrum, rhos: Sequence[float], cross: Tensor) -> list[Tensor]:
    """Minimisers of E |W x - W^ q|^2 + lambda |W^|^2 for each rho, lambda = rho * mean of the Gram's diagonal.

    q is x as the layer reads it, quantized or not. With H = E q q^T and G = E x q^T (centred: ours) the solution is
    W G (H + lambda I)^-1; without quantization it is Q-SAM2's closed form, which scales W along eigenvector k of the
    Gram by s_k / (s_k + lambda). rho = 0 and constant inputs give W itself, also if H is singular (ours; the limit
    would remove the directions in which the inputs do not vary).

    Args:
        weight: (m, n) float64.
        spectrum: Of H.
        cross: G, (n, n).
    """
    if not spectrum.rank:
        return [weight for _ in rhos]
    rotated = weight @ cross @ spectrum.vectors
    mean = spectrum.values.mean()
    return [(rotated / (spectrum.values + rho * mean)) @ spectrum.vectors.T if rho else weight for rho in rhos]


def acnr(weight: Tensor, noise: Tensor, steps: Sequence[float]) -> list[Tensor]:
    """W after each number of proximal steps; W itself for 0.

    sigma <- max(sigma, (sigma + 2 lambda t) / (1 + 2 lambda + 2 beta c)) for all but the leading singular values, t the
    mean of all, c the activations' quantization error along the direction, here (ours) of uncorrelated inputs. From the
    authors' code; without its threshold on the condition number, since 0 steps are a candidate.

    Args:
        weight: (m, n) float64.
        noise: (n,) mean squared quantization error of each input.
    """
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    along = right.square() @ noise  # (min(m, n),)
    results = {0: weight}
    for step in range(1, int(max(steps)) + 1):
        energy, order = sigma.square().sort(descending=True)
        leading = energy.cumsum(0) <= LEADING * energy.sum()
        leading[int(leading.sum().clamp(max=len(leading) - 1))] = True  # and the one that crosses the share
        raised = (sigma + 2 * PULL * sigma.mean()) / (1 + 2 * PULL + 2 * DAMPING * along)
        sigma = torch.where(leading[order.argsort()], sigma, torch.maximum(sigma, raised))
        if step in steps:
            results[step] = (left * sigma) @ right
    return [results[int(step)] for step in steps]


def refit_bias(weight: Tensor, new: Tensor, moments: Moments, bias: Tensor | None) -> Tensor:
    """Change (m,) of the bias that keeps the mean output, W E x - W^ E q; 0 without a bias."""
    shift = weight @ moments.mean - new @ moments.read_mean
    return shift if bias is not None else torch.zeros_like(shift)


def output_error(weight: Tensor, new: Tensor, shift: Tensor, moments: Moments) -> float:
    """E |W x - W^ q - shift|^2 from moments that hold W: of D q + W e - shift, with D = W - W^ and e = x - q.

    Args:
        weight: W, (m, n).
        new: W^, (m, n).
        shift: Change of the bias, (m,).
    """
    difference = weight - new
    spread = ((difference @ moments.scatter) * difference).sum() + moments.losses
    if moments.cross is not moments.scatter:
        spread += 2 * ((weight @ (moments.cross - moments.scatter)) * difference).sum()
    mean = weight @ moments.mean - new @ moments.read_mean - shift
    return float(spread / moments.count + mean.square().sum())


def output_energy(weight: Tensor, moments: Moments, centred: bool) -> float:
    """E |W x|^2, about the mean or about zero; 1 if that is 0, so that errors can be relative to it."""
    about_zero = 0.0 if centred else float((weight @ moments.mean).square().sum())
    return moments.outputs / moments.count + about_zero or 1.0


def _max_over_std(weight: Tensor) -> float:
    return float(weight.abs().max() / weight.std().clamp(min=torch.finfo(weight.dtype).tiny))
