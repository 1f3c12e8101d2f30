"""Calibration data of three time scales (ours, after Q-MiniSAM2): frames, successive frames, whole videos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qsam2.data.calibration_data import CalibrationData
from qsam2.data.clips import Source, annotated_frames
from qsam2.data.video import Video
from qsam2.reconstruction.blocks import Scale
from qsam2.run import Run


class SpreadVideo(Video):
    """Video of `num_frames` frames, evenly spread over the annotated frames of another."""

    def __init__(self, video: Video, num_frames: int) -> None:
        annotated = annotated_frames(video)
        positions = np.linspace(0, len(annotated) - 1, min(num_frames, len(annotated))).round().astype(int)
        self._video = video
        self._frames = [annotated[int(position)] for position in positions]
        self.name, self.size = video.name, video.size
        self.frame_names = [video.frame_names[index] for index in self._frames]

    def frame(self, index: int) -> np.ndarray:
        return self._video.frame(self._frames[index])

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        return self._video.masks(self._frames[index])


def time_scales(run: Run) -> dict[Scale, CalibrationData]:
    """Data of each scale: the run's stills and clips; clips of successive frames; clips spread over whole videos.

    All clips have `calibrate.num_frames` frames; there are at most as many spread clips as videos.
    """
    amount = run.recipe.calibrate
    spread = [
        Source([SpreadVideo(video, amount.num_frames) for video in source.videos], source.weight)
        for source in run.sources
    ]
    spread_clips = min(amount.clips, sum(len(source.videos) for source in run.sources))

    def draw(sources: Sequence[Source], clips: int) -> CalibrationData:
        only_clips = amount.model_copy(update={"clips": clips, "stills": 0})
        size = {"image_size": run.model.image_size, "max_objects": run.recipe.data.max_objects}
        return CalibrationData(sources, only_clips, **size, max_stride=1, seed=run.recipe.seed)

    return {"frame": run.calibration, "short": draw(run.sources, amount.clips), "long": draw(spread, spread_clips)}
