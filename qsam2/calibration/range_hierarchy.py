"""Ranges of activations aggregated from frames to clips to the whole set (after Q-MiniSAM2; the aggregation is ours).

The range of a clip is what at least two of its frames reach, which excludes single outliers but not a drift of many
frames; the range of the set is that of its widest clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from qsam2.data.calibration_data import CalibrationData, Sample
from qsam2.layers.convert import quantizers
from qsam2.layers.hooks import hooked
from qsam2.models import SAM2
from qsam2.quantizers import QuantizerState

PASSES = 2
"""Passes over each clip: from masks and from clicks."""
Frame = tuple[int, int]
"""Number of the image, and of the tracked frame."""


class RangeHierarchy:
    """Range of one activation, aggregated from frames to clips to the set."""

    def __init__(self) -> None:
        self.lower, self.upper = math.inf, -math.inf
        self._frames: dict[Frame, tuple[float, float]] = {}

    def add(self, frame: Frame, lower: float, upper: float) -> None:
        """Include the extremes of one call in those of its frame."""
        before = self._frames.get(frame, (math.inf, -math.inf))
        self._frames[frame] = min(lower, before[0]), max(upper, before[1])

    def end_clip(self, length: int = 0) -> None:
        """End a clip of `length` tracked frames, tracked any number of times: all frames since the last call."""
        frames, self._frames = self._frames, {}
        for (image, tracked), extremes in frames.items():
            self.add((image, tracked % length if length else tracked), *extremes)
        if self._frames:
            second = min(len(self._frames), 2) - 1
            self.lower = min(self.lower, sorted(lower for lower, _ in self._frames.values())[second])
            self.upper = max(self.upper, sorted((upper for _, upper in self._frames.values()), reverse=True)[second])
        self._frames = {}


class HierarchicalData(CalibrationData):
    """Calibration data after whose last sample observed ranges are limited to those of a `RangeHierarchy`.

    All stills together count as one clip.
    """

    def __init__(self, model: SAM2, data: CalibrationData) -> None:
        self.model, self.data = model, data
        self.stills, self.clips = data.stills, data.clips

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order of `data`."""
        return self._watched(self.data.samples())

    def clip_samples(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        """Clips only, in the order of `data`."""
        return self._watched(self.data.clip_samples(start, stop))

    def _watched(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        observing = [q for _, q in quantizers(self.model) if q.state is QuantizerState.OBSERVE]
        clips, stills = ([RangeHierarchy() for _ in observing] for _ in range(2))
        images = tracked = 0
        ranges = clips

        def count_image(*_: object) -> None:
            nonlocal images
            images += 1

        def count_tracked(*_: object) -> None:
            nonlocal tracked
            tracked += 1

        def record(index: str, args: tuple[Tensor, ...], _: object) -> None:
            lower, upper = (float(bound) for bound in args[0].aminmax())
            ranges[int(index)].add((images, tracked), lower, upper)

        with (
            hooked({str(index): quantizer for index, quantizer in enumerate(observing)}, record, before=True),
            hooked({"": self.model.image_encoder}, count_image, before=True),
            hooked({"": self.model.memory_encoder}, count_tracked),  # the last module of a tracked frame
        ):
            for sample in samples:
                ranges, tracked = clips if sample.tracked else stills, 0
                yield sample
                if sample.tracked:
                    for hierarchy in clips:
                        hierarchy.end_clip(tracked // PASSES)
        for quantizer, of_clips, of_stills in zip(observing, clips, stills, strict=True):
            of_stills.end_clip()
            quantizer.limit_observed(min(of_clips.lower, of_stills.lower), max(of_clips.upper, of_stills.upper))
