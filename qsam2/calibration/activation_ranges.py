"""Range calibration: weights from their values, activations from a few batches (ours: part by part).

The ranges of a part of SAM2 are found with all earlier parts quantized, so that quantizers observe the inputs they will
have. `find_ranges` calibrates one part, `find_sam2_ranges` all of them in order.

`HierarchicalData` aggregates ranges from frames to clips to the whole set (after Q-MiniSAM2; the aggregation is ours):
the range of a clip is what at least two of its frames reach, which excludes single outliers but not a drift of many
frames; the range of the set is that of its widest clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.forward import PROMPTS, ImageFeatures, encode, run_sample
from qsam2.data.calibration_data import CalibrationData, Sample, far_apart
from qsam2.errors import UserError
from qsam2.layers.convert import latent_weights, quantized_weights, quantizers, set_state
from qsam2.layers.hooks import hooked
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
    every other one from points, with a bank filled by the quantized model. Raises as `find_ranges`, with the sample's
    name.
    """
    set_state(model, QuantizerState.FLOAT)
    features = ImageFeatures(model, FEATURES_BYTES)  # of the quantized image encoder, once it has its ranges

    def in_memory_attention(name: str) -> bool:
        return name.startswith("memory_attention.")

    def fills_the_bank(name: str) -> bool:
        return not in_image_encoder(name) and not in_memory_attention(name)

    def fill_bank(sample: Sample) -> None:
        run_sample(model, far_apart(sample), PROMPTS, features)

    def attend(sample: Sample) -> None:
        prompt = PROMPTS[sample.clip.index % 2]  # a memory does not depend on whether a click or a box made it
        run_sample(model, sample, (prompt,), features)

    stages: tuple[tuple[str, Callable[[str], bool], Callable[[Sample], object]], ...] = (
        ("image encoder", in_image_encoder, lambda sample: encode(model, far_apart(sample))),
        ("memory encoder and mask decoder", fills_the_bank, fill_bank),
        ("memory attention", in_memory_attention, attend),
    )
    for what, part, run in stages:
        samples, count = data.clip_samples(), len(data.clips)
        if part is in_image_encoder:
            samples, count = data.samples(), len(data)
        if not any(quantizer.role == "activation" and part(name) for name, quantizer in quantizers(model)):
            samples, count = iter(()), 0  # ranges of weights need no data
        find_ranges(model, run, tqdm(samples, f"ranges, {what}", count, disable=not progress), part)


@torch.no_grad()
def find_ranges(
    model: nn.Module,
    run: Callable[[Batch], object],
    batches: Iterable[Batch],
    part: Callable[[str], bool] = lambda name: True,
) -> None:
    """Find the ranges of all quantizers in a part of the model (chosen by name) and switch them to QUANTIZE.

    `run` passes one batch through the model, in its current mode (train, eval). Meanwhile nothing in the part is
    quantized: its activation ranges are all set at the end. In a distributed run all ranks call it.

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


class RangeHierarchy:
    """Range of one activation, aggregated from frames to clips to the set."""

    def __init__(self) -> None:
        self.lower, self.upper = math.inf, -math.inf
        self._lowest: dict[tuple[int, int], float] = {}
        self._highest: dict[tuple[int, int], float] = {}

    def add(self, image: int, tracked: int, lower: float, upper: float) -> None:
        """Include the extremes of one call, with the number of its image and the index of its tracked frame.

        A clip may be tracked any number of times: all calls of a frame belong together.
        """
        frame = image, tracked
        self._lowest[frame] = min(lower, self._lowest.get(frame, lower))
        self._highest[frame] = max(upper, self._highest.get(frame, upper))

    def end_clip(self) -> None:
        """End a clip: all calls since the last one."""
        if self._lowest:
            second = min(len(self._lowest), 2) - 1
            self.lower = min(self.lower, sorted(self._lowest.values())[second])
            self.upper = max(self.upper, sorted(self._highest.values(), reverse=True)[second])
        self._lowest, self._highest = {}, {}


class HierarchicalData(CalibrationData):
    """Calibration data after whose last sample observed ranges are limited to those of a `RangeHierarchy`.

    All stills together count as one clip.
    """

    def __init__(self, model: SAM2, data: CalibrationData) -> None:
        self.model, self.data = model, data
        self.stills, self.clips = data.stills, data.clips

    def samples(self) -> Iterator[Sample]:
        return self._watched(self.data.samples())

    def clip_samples(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        return self._watched(self.data.clip_samples(start, stop))

    def _watched(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        observing = [q for _, q in quantizers(self.model) if q.state is QuantizerState.OBSERVE]
        clips, stills = ([RangeHierarchy() for _ in observing] for _ in range(2))
        ranges, images = clips, 0

        def count(*_: object) -> None:
            nonlocal images
            images += 1

        def record(index: str, args: tuple[Tensor, ...], _: object) -> None:
            lower, upper = (float(bound) for bound in args[0].aminmax())
            ranges[int(index)].add(images, self.model.tracked_frame, lower, upper)

        with (
            hooked({str(index): quantizer for index, quantizer in enumerate(observing)}, record, before=True),
            hooked({"image_encoder": self.model.image_encoder}, count, before=True),
        ):
            for sample in samples:
                ranges = clips if sample.tracked else stills
                yield sample
                if sample.tracked:
                    for hierarchy in clips:
                        hierarchy.end_clip()
        for quantizer, of_clips, of_stills in zip(observing, clips, stills, strict=True):
            of_stills.end_clip()
            quantizer.limit_observed(min(of_clips.lower, of_stills.lower), max(of_clips.upper, of_stills.upper))
