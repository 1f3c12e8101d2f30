"""Fits on video: the time scales of their data, and outputs that are the same by every way of reading memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from small_calibration import calibration_data
from small_videos import random_nano

from qsam2.data.clips import Source
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.memory.reader import use_memory
from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.recipe.recipe import MemoryRecipe
from qsam2.reconstruction.fit_video import SpreadVideo, time_scales, tracked


def test_outputs_do_not_depend_on_how_memory_is_read() -> None:
    model, frames = random_nano(), 3
    sample = next(calibration_data(1, max_objects=2, num_frames=frames).clip_samples())
    model.eval().requires_grad_(False)
    expected = tracked(model, sample, points=False)
    objects = len(expected.memories[0])
    assert [x.shape for x in expected.conditioned] == [(objects, (model.image_size // 16) ** 2, 128)] * 2
    assert len(expected.memories) == len(expected.masks) == frames
    use_memory(model, MemoryRecipe(cache=True))
    torch.testing.assert_close(tuple(tracked(model, sample, points=False)), tuple(expected), atol=1e-4, rtol=1e-4)


def test_frames_are_spread_over_the_whole_video() -> None:
    video = moving_objects("train", 1)[0]
    spread = SpreadVideo(video, 3)
    last = len(video) - 1
    expected = [0, round(last / 2), last]
    assert spread.frame_names == [video.frame_names[index] for index in expected]
    assert SpreadVideo(spread, 9).frame_names == spread.frame_names, "a short video is taken whole"
    assert len(spread) == 3 and (spread.name, spread.size) == (video.name, video.size)
    for index, original in enumerate(expected):
        assert np.array_equal(spread.frame(index), video.frame(original))
        masks, theirs = spread.masks(index), video.masks(original)
        assert masks is not None and theirs is not None and masks.keys() == theirs.keys()
        assert all(np.array_equal(masks[key], theirs[key]) for key in masks)


def test_scales_differ_in_time_alone() -> None:
    frames = calibration_data(3, max_stride=2, clips=5, num_frames=3)
    sources = [Source(moving_objects("train", 3))]
    amount = CalibrateRecipe(stills=2, clips=5, num_frames=3)
    recipe = SimpleNamespace(calibrate=amount, data=SimpleNamespace(max_objects=1), seed=0)
    model = SimpleNamespace(image_size=64)
    run: Any = SimpleNamespace(recipe=recipe, sources=sources, calibration=frames, model=model)
    scales = time_scales(run)
    assert scales["frame"] is frames
    short, long = scales["short"], scales["long"]
    assert len(short) == 5 and len(long) == 3  # as many as there are videos
    assert all(np.diff(sample.clip.frame_indices).tolist() == [1, 1] for sample in short.clip_samples())
    lengths = {video.name: len(video) for video in sources[0].videos}
    for sample in long.clip_samples():
        assert sample.clip.frame_indices == (0, 1, 2) and lengths[sample.clip.name] > 3
