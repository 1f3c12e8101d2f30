"""SmoothQuant (arXiv 2211.10438): channel scales move from the output of a LayerNorm into the layers that read it.

Dividing a norm's channels by s_j and multiplying the columns of its readers by s_j keeps the function and evens out the
ranges of the channels, which share one activation quantizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from sam2.modeling.memory_attention import MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.forward import run_sample
from qsam2.data.calibration_data import Sample
from qsam2.layers.hooks import Half, gather_halves
from qsam2.models import SAM2
from qsam2.models.nano.heavy import norms_and_readers as trunk_norms_and_readers
from qsam2.quantizers import QuantizerState, build_quantizer
from qsam2.recipe.quantize import LayerPlan, QuantizeRecipe
from qsam2.run import Run

log = logging.getLogger("qsam2")
ROWS = 32
"""Rows kept of each call of a layer, for the comparison of strengths."""


@dataclass(frozen=True)
class SmoothedNorm:
    """Result for one LayerNorm. Errors: of its quantized readers' outputs over their energy, held-out half."""

    readers: tuple[str, ...]
    alpha: float | None
    """None if no smoothing is best."""
    range_over_mean: tuple[float, float]
    """Largest over mean of the channels' max|x|, before and after smoothing."""
    error: tuple[float, float] | None
    """Error without and with smoothing; None if only one alpha is given."""


@dataclass
class ReaderInputs:
    """Inputs of a linear layer: max|x| per channel over all of them, and some rows of each half of the samples."""

    largest: Tensor
    fit: list[Tensor] = field(default_factory=list)
    held_out: list[Tensor] = field(default_factory=list)


def smooth_norms(run: Run) -> None:
    """Stage: move scales from LayerNorms into the layers that read them, in place; the function stays the same."""
    quantize, alphas = run.recipe.quantize, run.recipe.calibrate.smooth
    if quantize is None or alphas is None:
        return
    norms, data = norms_and_readers(run.model, quantize), run.calibration
    with run.folder.stage("smooth", f"SmoothQuant, {len(norms)} norms"):
        run.prepare_inference()
        names = [name for readers in norms.values() for name in readers]
        layers = {name: cast("nn.Linear", run.model.get_submodule(name)) for name in names}
        shown = tqdm(data.samples(), "gather inputs", len(data), disable=run.silent)
        inputs = gather_reader_inputs(layers, lambda sample: run_sample(run.model, sample), shown, len(data))
        rows = {}
        for name, readers in norms.items():
            norm = cast("nn.LayerNorm", run.model.get_submodule(name))
            rows[name] = smooth_norm(norm, {reader: layers[reader] for reader in readers}, inputs, quantize, alphas)
    smoothed = sum(row.alpha is not None for row in rows.values())
    log.info("SmoothQuant: %d of %d norms are smoothed", smoothed, len(rows))
    run.folder.record("smoothed", {name: vars(row) for name, row in rows.items()})


def norms_and_readers(model: SAM2, quantize: QuantizeRecipe) -> dict[str, list[str]]:
    """Names of normalisations whose output is read by linear layers only, with these layers, if their inputs quantize.

    Excluded are norms whose output is also added to a tensor (two-way transformer) or enters an activation function.
    """
    trunk = "image_encoder.trunk"
    names = {
        f"{trunk}.{norm}": [f"{trunk}.{reader}" for reader in readers]
        for norm, readers in trunk_norms_and_readers(model.image_encoder.trunk).items()
    }
    for name, module in model.named_modules():
        if isinstance(module, MemoryAttentionLayer):
            if not module.pos_enc_at_attn:
                names[f"{name}.norm1"] = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
            if not module.pos_enc_at_cross_attn_queries:
                names[f"{name}.norm2"] = [f"{name}.cross_attn_image.q_proj"]
            names[f"{name}.norm3"] = [f"{name}.linear1"]
        elif isinstance(module, CXBlock):
            names[f"{name}.norm"] = [f"{name}.pwconv1"]
    decoder = "sam_mask_decoder"
    heads = [f"{decoder}.output_hypernetworks_mlps.{k}." for k in range(model.sam_mask_decoder.num_mask_tokens)]
    heads += [f"{decoder}.iou_prediction_head", f"{decoder}.pred_obj_score_head", "obj_ptr_proj"]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names[f"{decoder}.transformer.norm_final_attn"] = [
        next(name for name in linear if name.startswith(head)) for head in heads
    ]
    return {
        norm: readers
        for norm, readers in names.items()
        if any(quantize.plan(reader).activations is not None for reader in readers)
    }


@torch.no_grad()
def gather_reader_inputs(
    layers: Mapping[str, nn.Linear], run: Callable[[Sample], object], samples: Iterable[Sample], count: int
) -> dict[str, ReaderInputs]:
    """Inputs of layers in one pass over `count` samples in two halves; raises as `gather_halves`."""
    inputs = {name: ReaderInputs(layer.weight.new_zeros(layer.in_features)) for name, layer in layers.items()}

    def record(half: Half, name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)  # (N, n)
        inputs[name].largest = torch.maximum(inputs[name].largest, rows.abs().amax(dim=0))
        kept = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=rows.device).long()
        getattr(inputs[name], half).append(rows[kept])

    gather_halves(layers, record, run, samples, count, remedy="give more clips, or leave calibrate.smooth out")
    return inputs


@torch.no_grad()
def smooth_norm(
    norm: nn.LayerNorm,
    readers: Mapping[str, nn.Linear],
    inputs: Mapping[str, ReaderInputs],
    quantize: QuantizeRecipe,
    alphas: Sequence[float],
) -> SmoothedNorm:
    """Divide the norm's channels by `smoothing_scales` and multiply the readers' columns by them, in place.

    Of several alphas, and no smoothing (ours), the one of least quantized output error on the held-out rows is taken.
    """
    weights = {reader: layer.weight.detach() for reader, layer in readers.items()}
    largest = torch.stack([inputs[reader].largest for reader in readers]).amax(dim=0)
    candidates: dict[float | None, Tensor] = {None: torch.ones_like(largest)}
    candidates |= {alpha: smoothing_scales(largest, list(weights.values()), alpha) for alpha in alphas}
    chosen: float | None = alphas[0]
    errors = None
    if len(alphas) > 1:
        totals = {
            alpha: sum(
                quantized_error(weight, inputs[reader], scales, quantize.plan(reader), reader)
                for reader, weight in weights.items()
            )
            for alpha, scales in candidates.items()
        }
        chosen = min(totals, key=totals.__getitem__)
        errors = totals[None], totals[chosen]
    scales = candidates[chosen]
    norm.weight.div_(scales)
    norm.bias.div_(scales)
    for layer in readers.values():
        layer.weight.mul_(scales)
    before, after = (
        float(channels.max() / channels.mean().clamp(min=1e-30)) for channels in (largest, largest / scales)
    )
    return SmoothedNorm(tuple(readers), chosen, (before, after), errors)


def smoothing_scales(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Scales s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), (n,) (SmoothQuant, eq. 4), over the W of all readers.

    1 for channels whose inputs or weights are all zero.

    Args:
        largest: (n,) max|X_j|; weights: (m, n) each; alpha: 0 balances the weights, 1 the inputs.
    """
    columns = torch.cat([weight.abs() for weight in weights]).amax(dim=0)
    scales = largest**alpha / columns.clamp(min=torch.finfo(columns.dtype).tiny) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), scales, 1.0)


def quantized_error(weight: Tensor, inputs: ReaderInputs, scales: Tensor, plan: LayerPlan, name: str) -> float:
    """|Q(x / s) Q(W s)^T - x W^T|^2 over |x W^T|^2 on the held-out rows, Q calibrated on the fitted ones."""
    fit, x = torch.cat(inputs.fit), torch.cat(inputs.held_out)
    quantized_x, quantized_weight = x / scales, weight * scales
    if plan.activations is not None:
        quantizer = build_quantizer(plan.activations, "activation", name=f"{name}.input_quantizer").to(x.device).eval()
        quantizer.state = QuantizerState.OBSERVE
        quantizer(fit / scales)
        quantizer.finish_observing()
        quantized_x = quantizer(quantized_x)
    if plan.weights is not None:
        of_weight = build_quantizer(plan.weights, "weight", num_channels=len(weight), name=f"{name}.weight_quantizer")
        of_weight.to(weight.device).initialize_from(quantized_weight)
        quantized_weight = of_weight(quantized_weight)
    out = x @ weight.T
    return float((quantized_x @ quantized_weight.T - out).square().sum() / out.square().sum().clamp(min=1e-30))
