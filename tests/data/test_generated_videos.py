"""Generated videos: moving objects and warped stills."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import Held, box, check

from qsam2.data.stills import coco_stills
from qsam2.data.synthetic import moving_objects as moving
from qsam2.data.synthetic import scenes
from qsam2.data.synthetic import warped_stills as warped
from qsam2.data.synthetic.moving_objects import FIRST_SEED, MovingObjects, moving_objects
from qsam2.data.synthetic.scenes import GeneratedVideo, draw_sprite
from qsam2.data.synthetic.warped_stills import WarpedStill

seeds = st.integers(0, 3 * 10**9)


def plain(picture: np.ndarray, masks: dict | None, num_frames: int = 1, name: str = "plain") -> Held:
    return Held([picture] * num_frames, [masks] * num_frames, name)


def photograph(seed: int = 7, size: tuple[int, int] = (120, 160), name: str = "plain") -> Held:
    """A photograph with one to five objects that are numbered 2, 4, ..."""
    video = MovingObjects(seed, size=size, max_objects=5)
    return plain(video.frame(0), {2 * object_id: mask for object_id, mask in video.masks(0).items()}, name=name)


def warp(seed: int, num_frames: int = 24, **options: Any) -> WarpedStill:
    return WarpedStill(photograph(), seed=seed, num_frames=num_frames, **options)


both_kinds = pytest.mark.parametrize("make", [MovingObjects, warp])


def forget() -> None:
    for cached in (scenes._render, moving._scene, warped._scene):
        cached.cache_clear()


def digest(video: GeneratedVideo, order: list[int]) -> dict[int, str]:
    digests = {}
    for index in order:
        parts = [video.frame(index), *(mask for _, mask in sorted(video.masks(index).items()))]
        digests[index] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return digests


@pytest.mark.parametrize(
    ("make", "seed", "options", "expected"),
    [
        (MovingObjects, 0, {}, "d56aab69e9695eb1ca8f59ca1f2aedfa7f8f0535bb7e87e7dbcaad53669eda71"),
        (MovingObjects, 10**9 + 7, {}, "ea560c497478cbeeb07b99506d4727203c6b38b571b353d2b82e005069958fc2"),
        (warp, 1, {"size": (128, 128)}, "14dd985e35b29633eb90366712411e70118945b03ef1398372427b4a110de263"),
    ],
)
def test_the_pixels_of_a_seed_never_change(make, seed, options, expected):
    digests = digest(make(seed, **options), [0, 9, 23])
    assert hashlib.sha256("".join(digests.values()).encode()).hexdigest() == expected


@given(seeds, st.sampled_from([(64, 64), (96, 128), (200, 100)]), st.integers(1, 8))
@settings(max_examples=25)
def test_masks_are_disjoint_and_frame_0_shows_every_object(seed, size, max_objects):
    video = MovingObjects(seed, num_frames=6, size=size, max_objects=max_objects)
    first = video.masks(0)
    assert list(first) == list(range(1, len(first) + 1)) and len(first) <= max_objects
    assert all(0.01 <= mask.mean() <= 0.35 for mask in first.values())
    still = photograph(seed)
    clip = WarpedStill(still, num_frames=6, seed=seed, size=size)
    assert len(clip) == 6 and clip.name == f"plain-warped-{seed}"
    assert list(clip.masks(0)) == sorted(still.masks(0))
    assert all(clip.masks(0)[k].mean() > 0.45 * mask.mean() for k, mask in still.masks(0).items())
    for made in (video, clip):
        for index in (0, 3, 5):
            frame, masks = made.frame(index), made.masks(index)
            assert frame.shape == (*size, 3) and frame.dtype == np.uint8 and list(masks) == list(made.masks(0))
            assert all(mask.shape == size and mask.dtype == bool for mask in masks.values())
            assert np.sum(list(masks.values()), axis=0).max() <= 1


@both_kinds
@given(seed=seeds, order=st.permutations(range(8)))
@settings(max_examples=8)
def test_frames_are_the_same_in_any_order(make, seed, order):
    video = make(seed, num_frames=8, size=(80, 72))
    forward = digest(video, list(range(8)))
    forget()
    assert digest(pickle.loads(pickle.dumps(video)), order) == forward


@both_kinds
def test_the_number_of_threads_changes_nothing(make):
    threads, digests = cv2.getNumThreads(), []
    try:
        for number in (1, 2):
            cv2.setNumThreads(number)
            forget()
            digests.append(digest(make(12), [0, 11]))
    finally:
        cv2.setNumThreads(threads)
    assert digests[0] == digests[1]


def test_a_longer_video_goes_on_where_a_shorter_one_ends():
    short, long = MovingObjects(5, num_frames=4, size=(64, 64)), MovingObjects(5, num_frames=40, size=(64, 64))
    assert digest(short, [0, 3]) == digest(long, [0, 3])
    assert len(long) == 40 and long.frame_names[39] == "00039"


@both_kinds
def test_seeds_and_names_differ_and_a_caller_may_write_into_what_it_gets(make):
    video = make(5, size=(64, 64))
    video.frame(0)[:] = 0
    next(iter(video.masks(0).values()))[:] = False
    assert video.frame(0).any() and next(iter(video.masks(0).values())).any()
    others = [make(seed, size=(64, 64)) for seed in range(4)]
    if make is warp:
        others.append(WarpedStill(photograph(name="other"), seed=0, num_frames=24, size=(64, 64)))
    assert len({digest(other, [1])[1] for other in others}) == len(others)


def test_a_mask_is_where_the_object_is_seen():
    """Paint an object in another colour: the frame changes on its mask and nowhere off it but at the soft edge."""
    checked = 0
    for seed in range(12):
        scene = replace(moving._scene(seed, (128, 128), 3), shutter=0.0)
        frame, labels = scene.compose(4)
        for object_id in scene.object_ids:
            sprites = []
            for sprite in scene.sprites:
                paint = np.array([128, 128, 128, 0], np.uint8) * (sprite.object_id == object_id)
                sprites.append(replace(sprite, picture=sprite.picture ^ paint.astype(np.uint8)))
            painted = replace(scene, sprites=sprites).compose(4)[0]
            changed = np.abs(painted.astype(int) - frame).max(-1) > 0
            mask = (labels == object_id).astype(np.uint8)
            inner, outer = cv2.erode(mask, np.ones((3, 3))) > 0, cv2.dilate(mask, np.ones((7, 7))) > 0
            assert changed[inner].mean() > 0.99 if inner.any() else True
            assert changed[~outer].sum() <= 0.1 * mask.sum()  # parts thinner than a pixel show and have no mask
            checked += bool(inner.any())
    assert checked > 10


def unhidden(scene: Any, index: int) -> list[int]:
    """The pixels of every object if nothing were in front of it."""
    areas = []
    for object_id in scene.object_ids:
        labels = np.zeros(scene.size, np.uint8)
        for sprite in scene.sprites:
            if sprite.object_id == object_id:
                draw_sprite(np.zeros((*scene.size, 3), np.uint8), labels, sprite, scene.view(index), index)
        areas.append(int((labels > 0).sum()))
    return areas


def test_objects_are_hidden_leave_return_and_change_size():
    objects = hidden = left = returned = resized = 0
    for seed in range(60):
        video, frames = MovingObjects(seed, num_frames=32, size=(64, 64)), range(0, 32, 2)
        seen = np.array([[mask.sum() for mask in video.masks(index).values()] for index in frames])
        alone = np.array([unhidden(video.scene(), index) for index in frames])
        gone = np.maximum.accumulate(alone == 0)
        objects += seen.shape[1]
        hidden += ((seen < 0.7 * alone) & (alone > 20)).any(0).sum()
        left += gone[-1].sum()
        returned += (gone & (seen > 0)).any(0).sum()
        resized += (alone.max(0) > 2 * np.maximum(alone.min(0), 1)).sum()
    assert hidden > 0.2 * objects and left > 0.08 * objects
    assert returned > 0.03 * objects and resized > 0.25 * objects


def test_any_object_may_be_in_front():
    front = set()
    for seed in range(30):
        order = [sprite.object_id for sprite in moving._scene(seed, (64, 64), 3).sprites if sprite.object_id]
        front |= {(near, far) for i, near in enumerate(order) for far in order[:i] if near != far}
    assert {(1, 2), (2, 1)} <= front


def test_the_splits_share_no_seed():
    assert [video.seed for video in moving_objects("val", 3)] == [10**9, 10**9 + 1, 10**9 + 2]
    assert len({video.name for split in FIRST_SEED for video in moving_objects(split, 50)}) == 150
    assert np.diff(sorted(FIRST_SEED.values())).min() >= moving.MOST_VIDEOS


@pytest.mark.parametrize("seed", range(6))
def test_with_a_calm_start_frame_0_is_the_still(seed):
    still = photograph(size=(128, 128))
    masks = dict(sorted(still.masks(0).items()))
    scene = warped._draw_scene(np.random.default_rng(seed), still.frame(0), masks, start=0.0)
    frame, labels = scene.compose(0)
    cut_out = np.isin(labels, [sprite.object_id for sprite in scene.sprites])
    rim = (cv2.dilate(cut_out.astype(np.uint8), np.ones((7, 7))) > 0) & ~cut_out  # filled in behind the object
    np.testing.assert_array_equal(frame[~rim], still.frame(0)[~rim])
    for label, mask in enumerate(masks.values(), start=1):
        np.testing.assert_array_equal(labels == label, mask)


def test_the_masks_of_a_warped_still_follow_the_picture():
    """Each object has a colour of its own: its mask is where that colour is seen."""
    picture, masks, moved = np.zeros((160, 160, 3), np.uint8), {}, 0
    for number, (top, left) in enumerate([(0, 10), (20, 80), (90, 30), (100, 100)]):
        masks[number + 1] = box((160, 160), top, left, 40, 45)
        picture[masks[number + 1]] = np.eye(3, dtype=np.uint8)[number % 3] * 200 + (20 if number == 3 else 0)
    for seed in range(8):
        scene = WarpedStill(plain(picture, masks), num_frames=24, seed=seed, size=(160, 160)).scene()
        frame, labels = scene.compose(17)
        moved += len(scene.sprites)
        for label in range(1, 5):
            inner = cv2.erode((labels == label).astype(np.uint8), np.ones((7, 7))) > 0
            if inner.any():
                colour = np.median(frame[inner], axis=0)
                assert colour.argmax() == (label - 1) % 3 and colour.max() > 100
                assert (frame[inner].argmax(-1) == (label - 1) % 3).mean() > 0.95
    assert moved > 8


def test_the_camera_never_leaves_the_picture():
    still = plain(np.full((100, 140, 3), 90, np.uint8), {1: np.ones((100, 140), bool)})
    for seed in range(25):
        video = WarpedStill(still, num_frames=50, seed=seed, size=(64, 96))
        for index in range(0, 50, 7):
            centred = warped.project(video.scene().frame_to_scene(index), warped.corners(64, 96))
            assert (np.abs(centred) <= np.array([48, 32]) * (1 + 1e-9)).all()
            assert video.masks(index)[1].all()


@pytest.mark.parametrize(
    ("mask", "moves"),
    [
        (box((64, 64), 20, 20, 20, 20), True),
        (box((64, 64), 20, 20, 20, 20) | box((64, 64), 20, 30, 44, 1), False),  # cut by the edge
        (box((64, 64), 5, 5, 45, 45), False),  # more than a quarter
    ],
)
def test_what_the_edge_cuts_or_is_large_stays_in_the_picture(mask, moves):
    still = plain(np.zeros((64, 64, 3), np.uint8), {1: mask})
    clips = [WarpedStill(still, num_frames=2, seed=seed, size=(64, 64)) for seed in range(8)]
    assert any(clip.scene().sprites for clip in clips) == moves


def test_overlapping_masks_put_the_smaller_in_front():
    large, small = box((64, 64), 0, 0, 40, 64), box((64, 64), 10, 10, 10, 10)
    labels = warped._paint({3: small, 9: large}, (64, 64))
    np.testing.assert_array_equal(labels == 1, small)
    np.testing.assert_array_equal(labels == 2, large & ~small)
    np.testing.assert_array_equal(warped._paint({3: small, 9: large}, (64, 64), leave_out=[1]) == 2, large)


def test_an_object_that_vanishes_is_left_out():
    masks = {1: box((600, 600), 501, 500, 1, 1), 2: box((600, 600), 100, 100, 200, 200), 3: np.zeros((600, 600), bool)}
    still = plain(np.zeros((600, 600, 3), np.uint8), masks)
    assert list(WarpedStill(still, num_frames=2, seed=0, size=(64, 64)).masks(1)) == [2]


@given(seeds)
@settings(max_examples=15)
def test_filling_keeps_what_is_known_and_stays_in_its_range(seed):
    rng = np.random.default_rng(seed)
    picture = rng.integers(60, 120, (int(rng.integers(20, 50)), int(rng.integers(20, 50)), 3), dtype=np.uint8)
    hole = box(picture.shape[:2], 5, 3, 10, 14)
    filled = warped._fill(np.where(hole[..., None], 255, picture).astype(np.uint8), hole)
    np.testing.assert_array_equal(filled[~hole], picture[~hole])
    assert filled[hole].min() >= 60 and filled[hole].max() < 120


def test_resizing_agrees_with_opencv_and_moves_nothing():
    photo = photograph(size=(150, 210)).frame(0)
    expected = cv2.resize(photo, (180, 140), interpolation=cv2.INTER_LINEAR)
    assert np.abs(warped._resize(photo, (140, 180)).astype(int) - expected).mean() < 1.5
    mask = cv2.circle(np.zeros((150, 210), np.uint8), (80, 60), 30, 1, -1) > 0
    small = warped.nearest(mask, *warped._spread(mask.shape, (64, 64)))
    at = np.argwhere(small).mean(0) + 0.5
    np.testing.assert_allclose(at, [60.5 * 64 / 150, 80.5 * 64 / 210], atol=0.3)


RANGES = [
    ({"seed": -1}, f"seed is -1; give a whole number from 0 to {2**63 - 1}"),
    ({"num_frames": 0}, "num_frames is 0; give a whole number from 1 to 100000"),
    ({"size": (32, 64)}, "height is 32; give a whole number from 64 to 2048"),
    ({"size": (64, 4096)}, "width is 4096; give a whole number from 64 to 2048"),
]
EMPTY = np.zeros((80, 80), bool)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *((MovingObjects, options, f"^MovingObjects: {message}$") for options, message in RANGES),
        *((warp, options, f"^WarpedStill: {message}$") for options, message in RANGES),
        (MovingObjects, {"max_objects": 9}, "^MovingObjects: max_objects is 9; give a whole number from 1 to 8$"),
        (moving_objects, {"split": "dev", "count": 2}, "split is 'dev'; allowed are train, val, test"),
        (moving_objects, {"split": "val", "count": 0}, "count is 0; give a whole number from 1 to 1000000$"),
    ],
)
def test_an_argument_out_of_range_is_named(make, options, message):
    check(message, lambda: make(**options) if make is moving_objects else make(**({"seed": 0} | options)))


@pytest.mark.parametrize(
    ("masks", "num_frames", "message"),
    [
        ({}, 2, "plain has 2 frames; give a video of one frame"),
        (None, 1, "plain has no masks; give an annotated still"),
        ({1: EMPTY}, 1, "plain shows no object at 64x96; leave it out"),
        ({}, 1, "plain shows no object at 64x96; leave it out"),
        (dict.fromkeys(range(1, 257), EMPTY), 1, "plain has 256 objects; give at most 255"),
    ],
)
def test_a_still_that_cannot_be_used_says_why(masks, num_frames, message):
    still = plain(np.zeros((80, 80, 3), np.uint8), masks, num_frames)
    check(message, lambda: WarpedStill(still, num_frames=4, seed=0, size=(64, 96)).masks(0))


@both_kinds
@pytest.mark.parametrize("index", [-1, 12])
def test_a_frame_outside_the_video_is_an_error(make, index):
    with pytest.raises(IndexError, match=f"(moving-0000000000|plain-warped-0): frame {index} of 12"):
        make(0, num_frames=12).masks(index)


def test_real_stills_move_hide_and_leave(data_root):
    moved = hidden = left = objects = 0
    for seed, still in enumerate(coco_stills(data_root / "coco_stills", "train")[:12]):
        video = WarpedStill(still, num_frames=24, seed=seed, size=(128, 128))
        areas = np.array([[mask.sum() for mask in video.masks(index).values()] for index in (0, 8, 16, 23)])
        assert (areas[0] > 0).all()
        objects += areas.shape[1]
        moved += len(video.scene().sprites)
        hidden += (areas.min(0) < 0.6 * areas[0]).sum()
        left += (areas == 0).any(0).sum()
    assert moved > 0.2 * objects and hidden > 0.1 * objects and left > 0
