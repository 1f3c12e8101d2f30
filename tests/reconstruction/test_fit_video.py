"""What the losses on video compare: there however the model reads its memory."""

from __future__ import annotations

import torch

from qsam2.data.calibration_data import Sample
from qsam2.data.clips import ClipDataset
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe.memory import MemoryRecipe
from qsam2.reconstruction.fit_video import tracked


def test_features_after_memory_attention_are_seen_however_memory_is_read(model: SAM2) -> None:
    frames = 3
    clips = ClipDataset(
        moving_objects("train", 1),
        num_frames=frames,
        max_objects=2,
        image_size=model.image_size,
        length=1,
        augment=False,
    )
    sample = Sample("clip", clips[0], tracked=True)
    model.eval().requires_grad_(False)
    expected = tracked(model, sample, points=False)
    objects = len(expected.memories[0])
    assert [each.shape for each in expected.conditioned] == [(objects, 128, (model.image_size // 16) ** 2, 1)] * 2
    assert len(expected.memories) == len(expected.masks) == frames
    use_memory(model, MemoryRecipe(cache=True))
    found = tracked(model, sample, points=False)
    for name in expected._fields:
        for one, other in zip(getattr(expected, name), getattr(found, name), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
