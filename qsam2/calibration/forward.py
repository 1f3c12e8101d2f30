"""How calibration samples pass through SAM2: images through the encoder, clips through tracking."""

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
"""Of images, as `SAM2.forward_image` gives them."""


def encode(model: SAM2, sample: Sample) -> Features:
    """Image features of a sample, found frame by frame: a clip at once would need much memory.

    Raises:
        UserError: as the model does, naming the sample.
    """
    return ImageFeatures(model).of(sample)


class ImageFeatures:
    """Image features of clips, while nothing changes in the image encoder.

    Those of a frame that is asked for again are kept, on the model's device, as far as `budget_bytes` go.
    """

    def __init__(self, model: SAM2, budget_bytes: float = 0.0) -> None:
        self.model = model
        self.left_bytes = budget_bytes
        self._kept: dict[tuple[str, int], list[Tensor]] = {}
        self._positions: list[Tensor] = []  # the same for all frames, and five times as large as their features

    @torch.no_grad()
    def of(self, sample: Sample) -> Features:
        """See `encode`; samples of the same label are of the same clip."""
        images = sample.clip.images.split(1)
        frames = [self._frame(sample, *each) for each in zip(sample.clip.frame_indices, images, strict=True)]
        positions = [position.expand(len(frames), -1, -1, -1) for position in self._positions]
        return {"backbone_fpn": [torch.cat(level) for level in zip(*frames, strict=True)], "vision_pos_enc": positions}

    def _frame(self, sample: Sample, index: int, image: Tensor) -> list[Tensor]:
        if (key := (sample.label, index)) in self._kept:
            return self._kept[key]
        found = _named(sample, self.model.forward_image, image.to(self.model.device))
        self._positions, levels = found["vision_pos_enc"], list(found["backbone_fpn"])
        needed = sum(level.nbytes for level in levels)
        if needed <= self.left_bytes:
            self.left_bytes -= needed
            self._kept[key] = levels
        return levels


@torch.no_grad()
def run_sample(
    model: SAM2, sample: Sample, prompts: Sequence[Prompt] = PROMPTS, features: ImageFeatures | None = None
) -> None:
    """Encode the sample's images, and track a clip: from its masks, from a click, from a box, with one correction each.

    All share the image features. The model is in eval mode; prompts are the same each time.

    Raises:
        UserError: as the model does, naming the sample.
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
            torch.manual_seed(sample.clip.index)  # sam2 moves the corners of boxes at random
            _named(sample, model.forward_tracking, model.prepare_prompt_inputs({**encoded}, batch), batch)
    model.prob_to_use_box_input_for_eval = 0.0


def _named(sample: Sample, run: Callable[..., Any], *args: Any) -> Any:
    try:
        return run(*args)
    except UserError as error:
        raise UserError(f"calibration sample {sample.label}: {error}") from error
