from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam2.data.stills import coco_stills
from qsam2.data.synthetic import warped_stills as module
from qsam2.data.synthetic.moving_objects import MovingObjects
from qsam2.data.synthetic.warped_stills import WarpedStill
from qsam2.data.video import Video
from qsam2.errors import UserError


class Plain(Video):
    """A still held in memory."""

    def __init__(self, picture: np.ndarray, masks: dict[int, np.ndarray] | None, num_frames: int = 1) -> None:
        self.name = "plain"
        self.frame_names = [f"{index:05d}" for index in range(num_frames)]
        self.size = picture.shape[:2]
        self._picture, self._masks = picture, masks

    def frame(self, index: int) -> np.ndarray:
        return self._picture

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        return self._masks


def _still(seed: int = 7, size: tuple[int, int] = (120, 160)) -> Plain:
    """A photograph with one to five objects that are numbered 2, 4, ..."""
    video = MovingObjects(seed, size=size, max_objects=5)
    return Plain(video.frame(0), {2 * object_id: mask for object_id, mask in video.masks(0).items()})


def _digest(video: WarpedStill, order: list[int]) -> dict[int, str]:
    digests = {}
    for index in order:
        parts = [video.frame(index), *(mask for _, mask in sorted(video.masks(index).items()))]
        digests[index] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return digests


def test_the_pixels_of_a_seed_never_change() -> None:
    digests = _digest(WarpedStill(_still(), num_frames=24, seed=1, size=(128, 128)), [0, 9, 23])
    assert (
        hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        == "14dd985e35b29633eb90366712411e70118945b03ef1398372427b4a110de263"
    )


@given(st.integers(0, 10**6), st.sampled_from([(64, 64), (96, 80), (128, 192)]))
@settings(max_examples=25, deadline=None)
def test_masks_are_disjoint_and_frame_0_shows_half_of_every_object(seed: int, size: tuple[int, int]) -> None:
    still = _still(seed)
    video = WarpedStill(still, num_frames=12, seed=seed, size=size)
    assert len(video) == 12 and video.name == f"plain-warped-{seed}"
    first = video.masks(0)
    assert list(first) == sorted(still.masks(0))
    for object_id, mask in still.masks(0).items():
        assert first[object_id].mean() > 0.45 * mask.mean()
    for index in (0, 6, 11):
        frame, masks = video.frame(index), video.masks(index)
        assert frame.shape == (*size, 3) and frame.dtype == np.uint8 and list(masks) == list(first)
        assert all(mask.shape == size and mask.dtype == bool for mask in masks.values())
        assert np.sum(list(masks.values()), axis=0).max() <= 1


@given(st.integers(0, 10**6), st.permutations(range(8)))
@settings(max_examples=8, deadline=None)
def test_frames_are_the_same_in_any_order(seed: int, order: list[int]) -> None:
    video = WarpedStill(_still(), num_frames=8, seed=seed, size=(72, 80))
    assert _digest(pickle.loads(pickle.dumps(video)), order) == _digest(video, list(range(8)))


def test_seeds_and_stills_differ() -> None:
    digests = {_digest(WarpedStill(_still(), num_frames=2, seed=seed), [1])[1] for seed in range(4)}
    assert len(digests) == 4
    other = _still()
    other.name = "other"
    assert _digest(WarpedStill(other, num_frames=2, seed=0), [1])[1] not in digests


@pytest.mark.parametrize("seed", range(6))
def test_with_a_calm_start_frame_0_is_the_still(seed: int) -> None:
    still = _still(size=(128, 128))
    masks = dict(sorted(still.masks(0).items()))
    scene = module._draw_scene(np.random.default_rng(seed), still.frame(0), masks, start=0.0)
    frame, labels = module._compose(scene, 0)
    cut_out = np.isin(labels, [sprite.object_id for sprite in scene.sprites])
    rim = (cv2.dilate(cut_out.astype(np.uint8), np.ones((7, 7))) > 0) & ~cut_out  # filled in behind the object
    np.testing.assert_array_equal(frame[~rim], still.frame(0)[~rim])
    for label, mask in enumerate(masks.values(), start=1):
        np.testing.assert_array_equal(labels == label, mask)


def test_the_masks_follow_the_picture() -> None:
    """Each object has a colour of its own: its mask is where that colour is seen."""
    picture, masks = np.zeros((160, 160, 3), np.uint8), {}
    for number, (top, left) in enumerate([(0, 10), (20, 80), (90, 30), (100, 100)]):
        masks[number + 1] = np.zeros((160, 160), bool)
        masks[number + 1][top : top + 40, left : left + 45] = True
        picture[masks[number + 1]] = np.eye(3, dtype=np.uint8)[number % 3] * 200 + (20 if number == 3 else 0)
    moved = 0
    for seed in range(8):
        video = WarpedStill(Plain(picture, masks), num_frames=24, seed=seed, size=(160, 160))
        scene = module._scene(video)
        frame, labels = module._compose(scene, 17)
        moved += len(scene.sprites)
        for label in range(1, 5):
            inner = cv2.erode((labels == label).astype(np.uint8), np.ones((7, 7))) > 0
            if inner.any():
                colour = np.median(frame[inner], axis=0)
                assert colour.argmax() == (label - 1) % 3 and colour.max() > 100
                assert (frame[inner].argmax(-1) == (label - 1) % 3).mean() > 0.95
    assert moved > 8


def test_the_camera_never_leaves_the_picture() -> None:
    still = Plain(np.full((100, 140, 3), 90, np.uint8), {1: np.ones((100, 140), bool)})
    for seed in range(25):
        video = WarpedStill(still, num_frames=50, seed=seed, size=(64, 96))
        scene = module._scene(video)
        for index in range(0, 50, 7):
            centred = module.project(scene.frame_to_scene(index), module.corners(64, 96))
            assert (np.abs(centred) <= np.array([48, 32]) * (1 + 1e-9)).all()
            assert video.masks(index)[1].all()


def test_what_the_edge_cuts_or_is_large_stays_in_the_picture() -> None:
    mask = np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    assert module._may_move(mask)
    mask[20:, 30] = True
    assert not module._may_move(mask)
    large = np.zeros((60, 60), bool)
    large[5:50, 5:50] = True
    assert not module._may_move(large)


def test_overlapping_masks_put_the_smaller_in_front() -> None:
    large, small = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    large[:40], small[10:20, 10:20] = True, True
    labels = module._paint({3: small, 9: large}, (64, 64))
    np.testing.assert_array_equal(labels == 1, small)
    np.testing.assert_array_equal(labels == 2, large & ~small)
    np.testing.assert_array_equal(module._paint({3: small, 9: large}, (64, 64), leave_out=[1]) == 2, large)


def test_an_object_that_vanishes_is_left_out() -> None:
    large, dot = np.zeros((600, 600), bool), np.zeros((600, 600), bool)
    large[100:300, 100:300], dot[501, 500] = True, True
    still = Plain(np.zeros((600, 600, 3), np.uint8), {1: dot, 2: large, 3: np.zeros((600, 600), bool)})
    assert list(WarpedStill(still, num_frames=2, seed=0, size=(64, 64)).masks(1)) == [2]


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_filling_keeps_what_is_known_and_stays_in_its_range(seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = rng.integers(60, 120, (int(rng.integers(20, 50)), int(rng.integers(20, 50)), 3), dtype=np.uint8)
    hole = np.zeros(picture.shape[:2], bool)
    hole[5:15, 3:17] = True
    filled = module._fill(np.where(hole[..., None], 255, picture).astype(np.uint8), hole)
    np.testing.assert_array_equal(filled[~hole], picture[~hole])
    assert filled[hole].min() >= 60 and filled[hole].max() < 120


def test_resizing_agrees_with_opencv_and_moves_nothing() -> None:
    photo = _still(size=(150, 210)).frame(0)
    expected = cv2.resize(photo, (180, 140), interpolation=cv2.INTER_LINEAR)
    assert np.abs(module._resize(photo, (140, 180)).astype(int) - expected).mean() < 1.5
    mask = cv2.circle(np.zeros((150, 210), np.uint8), (80, 60), 30, 1, -1) > 0
    small = module.nearest(mask, *module._spread(mask.shape, (64, 64)))
    at = np.argwhere(small).mean(0) + 0.5
    np.testing.assert_allclose(at, [60.5 * 64 / 150, 80.5 * 64 / 210], atol=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0; give a whole number from 1 to 100000"),
        ({"seed": -1}, f"seed is -1; give a whole number from 0 to {2**63 - 1}"),
        ({"size": (32, 64)}, "height is 32; give a whole number from 64 to 2048"),
        ({"size": (64, 4096)}, "width is 4096; give a whole number from 64 to 2048"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^WarpedStill: {message}$"):
        WarpedStill(_still(), **({"num_frames": 4, "seed": 0} | arguments))


def test_a_still_that_cannot_be_used_says_why() -> None:
    picture, empty = np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80), bool)
    with pytest.raises(UserError, match="plain has 2 frames; give a video of one frame"):
        WarpedStill(Plain(picture, {}, num_frames=2), num_frames=4, seed=0)
    for masks, message in [
        (None, "plain has no masks; give an annotated still"),
        ({1: empty}, "plain shows no object at 64x96; leave it out"),
        ({}, "plain shows no object at 64x96; leave it out"),
        (dict.fromkeys(range(1, 257), empty), "plain has 256 objects; give at most 255"),
    ]:
        with pytest.raises(UserError, match=message):
            WarpedStill(Plain(picture, masks), num_frames=4, seed=0, size=(64, 96)).masks(0)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_frame_outside_the_video_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"plain-warped-0: frame {index} of 4"):
        WarpedStill(_still(), num_frames=4, seed=0).masks(index)


@pytest.mark.skipif("QSAM2_DATA" not in os.environ, reason="QSAM2_DATA does not name the folder of the real data")
def test_real_stills_move_hide_and_leave() -> None:
    moved = hidden = left = objects = 0
    for seed, still in enumerate(coco_stills(Path(os.environ["QSAM2_DATA"]) / "coco_stills", "train")[:12]):
        video = WarpedStill(still, num_frames=24, seed=seed, size=(128, 128))
        areas = np.array([[mask.sum() for mask in video.masks(index).values()] for index in (0, 8, 16, 23)])
        assert (areas[0] > 0).all()
        objects += areas.shape[1]
        moved += len(module._scene(video).sprites)
        hidden += (areas.min(0) < 0.6 * areas[0]).sum()
        left += (areas == 0).any(0).sum()
    assert moved > 0.2 * objects and hidden > 0.1 * objects and left > 0
