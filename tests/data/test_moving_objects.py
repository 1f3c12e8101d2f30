from __future__ import annotations

import numpy as np
import pytest

from qsam2.data.moving_objects import MovingObjects, moving_objects
from qsam2.errors import UserError


def test_frames_and_masks() -> None:
    video = MovingObjects(3, num_frames=5, size=(96, 128))
    assert len(video) == 5 and video.frame_names[4] == "00004"
    frame, masks = video.frame(4), video.masks(4)
    assert frame.shape == (96, 128, 3) and frame.dtype == np.uint8
    assert sorted(masks) == list(range(1, len(masks) + 1))
    assert all(mask.shape == (96, 128) and mask.dtype == bool for mask in masks.values())


def test_an_unknown_split_says_which_are_allowed() -> None:
    with pytest.raises(UserError, match="split is 'dev'; allowed are train, val, test"):
        moving_objects("dev", 2)
