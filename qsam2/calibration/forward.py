"""Forward passes of calibration samples through SAM2: images through the encoder, clips through tracking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from qsam2.data.calibration_data import Sample
from qsam2.data.clips import collate_clips
from qsam2.errors import UserError
from qsam2.models import SAM2

Prompt = Literal["mask", "click", "box"]
PROMPTS: tuple[Prompt, ...] = ("mask", "click", "box")
Features = dict[str, Any]
"""Features of images, as returned by `SAM2.forward_image`."""


def encode(model: SAM2, sample: Sample) -> Features:
    """Image features of a sample, computed frame by frame to bound memory; raises as `run_sample`."""
    return ImageFeatures(model).of(sample)


class ImageFeatures:
    """Cache of the image features of clips, valid while the image encoder does not change.

    Features are kept on the model's device, up to `budget_bytes`.
    """

    def __init__(self, model: SAM2, budget_bytes: float = 0.0) -> None:
        self.model = model
        self.left_bytes = budget_bytes
        self._cache: dict[tuple[str, int], list[Tensor]] = {}
        self._positions: list[Tensor] = []  # the same for all frames, and five times as large as their features

    @torch.no_grad()
    def of(self, sample: Sample) -> Features:
        """Image features of a sample; samples of one label belong to one clip."""
        images = sample.clip.images.split(1)
        indexed = zip(sample.clip.frame_indices, images, strict=True)
        frames = [self._frame(sample, index, image) for index, image in indexed]
        positions = [position.expand(len(frames), -1, -1, -1) for position in self._positions]
        return {"backbone_fpn": [torch.cat(level) for level in zip(*frames, strict=True)], "vision_pos_enc": positions}

    def _frame(self, sample: Sample, index: int, image: Tensor) -> list[Tensor]:
        if (key := (sample.label, index)) in self._cache:
            return self._cache[key]
        features = _naming_sample(sample, self.model.forward_image, image.to(self.model.device))
        self._positions, levels = features["vision_pos_enc"], list(features["backbone_fpn"])
        needed = sum(level.nbytes for level in levels)
        if needed <= self.left_bytes:
            self.left_bytes -= needed
            self._cache[key] = levels
        return levels


@torch.no_grad()
def run_sample(
    model: SAM2, sample: Sample, prompts: Sequence[Prompt] = PROMPTS, features: ImageFeatures | None = None
) -> None:
    """Encode the sample's images, and track a clip once per kind of prompt, each with one correction.

    All passes share the image features. The model is in eval mode; prompts are deterministic.

    Raises:
        UserError: an error of the model, with the sample's name.
    """
    encoded = features.of(sample) if features else encode(model, sample)
    if not sample.tracked:
        return
    batch = collate_clips([sample.clip]).to(model.device)
    model.num_correction_pt_per_frame = 1
    for prompt in prompts:
        model.prob_to_use_pt_input_for_eval = float(prompt != "mask")
        model.prob_to_use_box_input_for_eval = float(prompt == "box")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample.clip.index)  # sam2 jitters the corners of boxes
            _naming_sample(sample, model.forward_tracking, model.prepare_prompt_inputs({**encoded}, batch), batch)
    model.prob_to_use_box_input_for_eval = 0.0


def _naming_sample(sample: Sample, run: Callable[..., Any], *args: Any) -> Any:
    try:
        return run(*args)
    except UserError as error:
        raise UserError(f"calibration sample {sample.label}: {error}") from error
