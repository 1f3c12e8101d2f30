"""Calibration samples: stills and clips without augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qsam2.data.clips import Clip, ClipDataset, Source, annotated_frames
from qsam2.errors import UserError
from qsam2.recipe import Recipe
from qsam2.recipe.calibrate import CalibrateRecipe


@dataclass(frozen=True)
class Sample:
    """A still, which only the image encoder sees, or a clip, which is tracked."""

    label: str
    clip: Clip
    tracked: bool


class CalibrationData:
    """The stills and clips that a recipe asks for, drawn from sources: the same for the same seed.

    A still is a frame of a clip of its own, so that stills show other videos than the clips do. `options` are those of
    `ClipDataset`: image_size, max_objects, max_stride. Raises UserError if the sources hold fewer different stills or
    clips than asked for.
    """

    def __init__(self, sources: Sequence[Source], amount: CalibrateRecipe, *, seed: int, **options: Any) -> None:
        _check_enough(sources, amount.stills, 1, "stills")
        _check_enough(sources, amount.clips, amount.num_frames, "clips")
        draw = partial(ClipDataset, sources, augment=False, **options)
        self.stills = draw(num_frames=1, length=amount.stills, seed=seed + 1)
        self.clips = draw(num_frames=amount.num_frames, length=amount.clips, seed=seed)

    @classmethod
    def of(cls, recipe: Recipe, sources: Sequence[Source], image_size: int) -> CalibrationData:
        """Samples that a recipe asks for."""
        data = recipe.data
        options = {"image_size": image_size, "max_objects": data.max_objects, "max_stride": data.max_stride}
        return cls(sources, recipe.calibrate, seed=recipe.seed, **options)

    def __len__(self) -> int:
        """Number of stills and clips."""
        return len(self.stills) + len(self.clips)

    def samples(self) -> Iterator[Sample]:
        """All, in two halves of clips and stills each."""
        clips, stills = len(self.clips) // 2, len(self.stills) // 2
        yield from self.clip_samples(0, clips)
        yield from self._still_samples(0, stills)
        yield from self.clip_samples(clips)
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
    """The same clip, but only its first frame, one in the middle and its last: enough where its length is no matter."""
    clip, last = sample.clip, len(sample.clip.frame_indices) - 1
    kept = sorted({0, round(last / 2), last})
    frames = tuple(clip.frame_indices[index] for index in kept)
    return replace(sample, clip=replace(clip, images=clip.images[kept], masks=clip.masks[kept], frame_indices=frames))
