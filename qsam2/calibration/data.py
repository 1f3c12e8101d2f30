"""What calibration looks at: stills and clips without augmentation, and how they pass through SAM2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qsam2.data.clips import Clip, ClipDataset, Source, annotated_frames, collate_clips
from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.recipe.calibrate import CalibrateRecipe

Prompt = Literal["mask", "click", "box"]
PROMPTS: tuple[Prompt, ...] = ("mask", "click", "box")

FAR_APART = 3
"""Frames of a clip that stand for it where its length does not matter."""


@dataclass(frozen=True)
class Sample:
    """A still, which only the image encoder sees, or a clip, which is tracked."""

    label: str
    clip: Clip
    tracked: bool


class CalibrationData:
    """The stills and clips that a recipe asks for, drawn from sources: the same for the same seed.

    A still is a frame of a clip of its own, so that stills show other videos than the clips do.

    Raises:
        UserError: the sources hold fewer different stills or clips than asked for.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        amount: CalibrateRecipe,
        *,
        image_size: int,
        max_objects: int,
        max_stride: int,
        seed: int,
    ) -> None:
        _check_enough(sources, amount.stills, 1, "stills")
        _check_enough(sources, amount.clips, amount.num_frames, "clips")

        def draw(length: int, num_frames: int, seed: int) -> ClipDataset:
            return ClipDataset(
                sources,
                num_frames=num_frames,
                max_objects=max_objects,
                image_size=image_size,
                length=length,
                augment=False,
                seed=seed,
                max_stride=max_stride,
            )

        self.stills = draw(amount.stills, 1, seed + 1)
        self.clips = draw(amount.clips, amount.num_frames, seed)

    def __len__(self) -> int:
        """Number of stills and clips."""
        return len(self.stills) + len(self.clips)

    def samples(self) -> Iterator[Sample]:
        """All, in two halves of clips and stills each."""
        clips, stills = len(self.clips) // 2, len(self.stills) // 2
        yield from self.clip_samples(0, clips)
        yield from self._still_samples(0, stills)
        yield from self.clip_samples(clips, len(self.clips))
        yield from self._still_samples(stills, len(self.stills))

    def clip_samples(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        """The clips alone."""
        for index in range(start, len(self.clips) if stop is None else stop):
            clip = self.clips[index]
            yield Sample(f"clip {index} ({clip.name})", clip, tracked=True)

    def _still_samples(self, start: int, stop: int) -> Iterator[Sample]:
        for index in range(start, stop):
            clip = self.stills[index]
            yield Sample(f"still {index} ({clip.name})", clip, tracked=False)


def _check_enough(sources: Sequence[Source], asked: int, num_frames: int, key: str) -> None:
    """Different first frames count: successive clips of a video may overlap."""
    lengths = (len(annotated_frames(video)) for source in sources for video in source.videos)
    found = sum(max(length - num_frames + 1, 1) for length in lengths)
    if found < asked:
        raise UserError(f"calibrate.{key}={asked}: the train sources hold {found} {key}; give more data or {found}")


def far_apart(sample: Sample) -> Sample:
    """The same clip, but only its first frame, one in the middle and its last."""
    clip, last = sample.clip, len(sample.clip.frame_indices) - 1
    kept = sorted({round(last * step / (FAR_APART - 1)) for step in range(FAR_APART)})
    frames = tuple(clip.frame_indices[index] for index in kept)
    return replace(sample, clip=replace(clip, images=clip.images[kept], masks=clip.masks[kept], frame_indices=frames))


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
