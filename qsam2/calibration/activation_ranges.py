"""Range calibration: weights from their values, activations from a few batches (ours: part by part).

The ranges of a part of SAM2 are found with all earlier parts quantized, so that quantizers observe the inputs they will
have. `find_ranges` calibrates one part, `find_sam2_ranges` all of them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from qsam2.calibration.forward import PROMPTS, ImageFeatures, Prompt, encode, run_sample
from qsam2.calibration.range_hierarchy import HierarchicalData
from qsam2.data.calibration_data import CalibrationData, Sample, far_apart
from qsam2.errors import UserError
from qsam2.layers.convert import latent_weights, quantized_weights, quantizers, set_state
from qsam2.models import SAM2
from qsam2.output import listed
from qsam2.quantizers import QuantizerState
from qsam2.run import Run

Batch = TypeVar("Batch")
FEATURES_BYTES = 2e9
"""Memory for image features shared by two stages of calibration: 120 frames at 1024 px."""


def calibrate_ranges(run: Run) -> None:
    """Stage: find the ranges of all quantizers."""
    if run.recipe.quantize is None:
        return
    amount, reconstruct = run.recipe.calibrate, run.recipe.reconstruct
    data = run.calibration
    if reconstruct is not None and reconstruct.video is not None:
        data = HierarchicalData(run.model, data)
    with run.folder.stage("calibrate", f"{amount.stills} stills, {amount.clips} clips of {amount.num_frames} frames"):
        run.prepare_inference()
        find_sam2_ranges(run.model, data, progress=not run.silent)
    run.latent = latent_weights(run.model)


def in_image_encoder(name: str) -> bool:
    """True for layers of `SAM2.forward_image`, which includes two of the mask decoder's."""
    return name.startswith(("image_encoder.", "sam_mask_decoder.conv_s"))


def find_sam2_ranges(model: SAM2, data: CalibrationData, *, progress: bool = True) -> None:
    """Find the ranges of a converted SAM2, in eval mode, part by part with earlier parts quantized.

    First the image encoder, on the stills and three distant frames of each clip. Then, on these clips, the modules that
    fill the memory bank: prompt encoder, mask decoder and memory encoder. Last the memory attention, on whole clips,
    every other one from points, with a bank filled by the quantized model.

    Raises:
        UserError: see `find_ranges`; names the sample.
    """
    set_state(model, QuantizerState.FLOAT)
    stages: tuple[tuple[str, Callable[[str], bool], Callable[[Sample], object]], ...] = (
        ("image encoder", in_image_encoder, lambda sample: encode(model, far_apart(sample))),
        ("memory encoder and mask decoder", _fills_the_bank, lambda sample: track(far_apart(sample), PROMPTS)),
        ("memory attention", _in_memory_attention, lambda sample: track(sample, (_prompt(sample),))),
    )
    features = ImageFeatures(model, FEATURES_BYTES)  # of the quantized image encoder, once it has its ranges

    def track(sample: Sample, prompts: Sequence[Prompt]) -> None:
        run_sample(model, sample, prompts, features)

    for what, part, run in stages:
        samples, count = data.clip_samples(), len(data.clips)
        if part is in_image_encoder:
            samples, count = data.samples(), len(data)
        if not any(quantizer.role == "activation" and part(name) for name, quantizer in quantizers(model)):
            samples, count = iter(()), 0  # ranges of weights need no data
        find_ranges(model, run, tqdm(samples, f"ranges, {what}", count, disable=not progress), part)


def _prompt(sample: Sample) -> Prompt:
    return PROMPTS[sample.clip.index % 2]  # a memory does not depend on whether a click or a box made it


def _in_memory_attention(name: str) -> bool:
    return name.startswith("memory_attention.")


def _fills_the_bank(name: str) -> bool:
    return not in_image_encoder(name) and not _in_memory_attention(name)


@torch.no_grad()
def find_ranges(
    model: nn.Module,
    run: Callable[[Batch], object],
    batches: Iterable[Batch],
    part: Callable[[str], bool] = lambda name: True,
) -> int:
    """Find the ranges of all quantizers in a part of the model (chosen by name) and switch them to QUANTIZE.

    `run` passes one batch through the model, in its current mode (train, eval). Meanwhile nothing in the part is
    quantized: its activation ranges are all set at the end. Returns the number of batches. In a distributed run all
    ranks call it.

    Raises:
        UserError: a batch or a weight holds NaN or infinity, or no batch reached some quantizer.
    """
    activations = [quantizer for name, quantizer in quantizers(model) if quantizer.role == "activation" and part(name)]
    weights = [(layer, quantizer) for name, layer, quantizer in quantized_weights(model) if part(name)]
    for _, quantizer in weights:
        quantizer.state = QuantizerState.FLOAT
    for quantizer in activations:
        quantizer.state = QuantizerState.OBSERVE
    count = 0
    for batch in batches:
        run(batch)
        count += 1

    unreached = []
    for quantizer in activations:
        try:
            quantizer.finish_observing()
        except UserError:  # all ranks have to call this for all quantizers before any of them raises
            unreached.append(quantizer.name)
    if unreached:
        raise UserError(
            f"{count} calibration batches did not reach {listed(unreached)}: calibrate on clips with masks, "
            "clicks and boxes, or keep these layers in float by a rule"
        )
    for layer, quantizer in weights:
        quantizer.initialize_from(layer.weight)
    return count
