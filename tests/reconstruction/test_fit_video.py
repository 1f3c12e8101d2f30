"""Outputs that the losses on video compare: the same tensors by every way of reading memory."""

from __future__ import annotations

import torch
from small_videos import random_nano

from qsam2.data.calibration_data import Sample
from qsam2.data.clips import ClipDataset
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.memory.reader import use_memory
from qsam2.recipe.recipe import MemoryRecipe
from qsam2.reconstruction.fit_video import tracked


def test_outputs_do_not_depend_on_how_memory_is_read() -> None:
    model, frames = random_nano(), 3
    clips = ClipDataset(
        moving_objects("train", 1), num_frames=frames, max_objects=2, image_size=64, length=1, augment=False
    )
    sample = Sample("clip", clips[0], tracked=True)
    model.eval().requires_grad_(False)
    expected = tracked(model, sample, points=False)
    objects = len(expected.memories[0])
    assert [x.shape for x in expected.conditioned] == [(objects, 128, (model.image_size // 16) ** 2, 1)] * 2
    assert len(expected.memories) == len(expected.masks) == frames
    use_memory(model, MemoryRecipe(cache=True))
    torch.testing.assert_close(tuple(tracked(model, sample, points=False)), tuple(expected), atol=1e-4, rtol=1e-4)
