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

from qsam2.data.synthetic import moving_objects as module
from qsam2.data.synthetic.moving_objects import FIRST_SEED, MovingObjects, moving_objects
from qsam2.data.synthetic.sprites import draw_sprite
from qsam2.errors import UserError

seeds = st.integers(0, 3 * 10**9)


def _forget() -> None:
    module._render.cache_clear()
    module._scene.cache_clear()


def _digest(video: MovingObjects, order: list[int]) -> dict[int, str]:
    digests = {}
    for index in order:
        parts = [video.frame(index), *(mask for _, mask in sorted(video.masks(index).items()))]
        digests[index] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return digests


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, "d56aab69e9695eb1ca8f59ca1f2aedfa7f8f0535bb7e87e7dbcaad53669eda71"),
        (1_000_000_007, "ea560c497478cbeeb07b99506d4727203c6b38b571b353d2b82e005069958fc2"),
    ],
)
def test_the_pixels_of_a_seed_never_change(seed: int, expected: str) -> None:
    digests = _digest(MovingObjects(seed), [0, 9, 23])
    assert hashlib.sha256("".join(digests.values()).encode()).hexdigest() == expected


@given(seeds, st.sampled_from([(64, 64), (96, 128), (200, 100)]), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_masks_are_disjoint_and_frame_0_shows_every_object(seed: int, size: tuple[int, int], max_objects: int) -> None:
    video = MovingObjects(seed, num_frames=6, size=size, max_objects=max_objects)
    first = video.masks(0)
    assert list(first) == list(range(1, len(first) + 1)) and len(first) <= max_objects
    assert all(0.01 <= mask.mean() <= 0.35 for mask in first.values())
    for index in (0, 3, 5):
        frame, masks = video.frame(index), video.masks(index)
        assert frame.shape == (*size, 3) and frame.dtype == np.uint8 and list(masks) == list(first)
        assert all(mask.shape == size and mask.dtype == bool for mask in masks.values())
        assert np.sum(list(masks.values()), axis=0).max() <= 1


@given(seeds, st.permutations(range(8)))
@settings(max_examples=8, deadline=None)
def test_frames_are_the_same_in_any_order(seed: int, order: list[int]) -> None:
    video = MovingObjects(seed, num_frames=8, size=(80, 72))
    forward = _digest(video, list(range(8)))
    _forget()
    assert _digest(pickle.loads(pickle.dumps(video)), order) == forward


def test_the_number_of_threads_changes_nothing() -> None:
    threads = cv2.getNumThreads()
    digests = []
    try:
        for number in (1, 2):
            cv2.setNumThreads(number)
            _forget()
            digests.append(_digest(MovingObjects(12), [0, 11]))
    finally:
        cv2.setNumThreads(threads)
    assert digests[0] == digests[1]


def test_a_longer_video_goes_on_where_a_shorter_one_ends() -> None:
    short, long = MovingObjects(5, num_frames=4, size=(64, 64)), MovingObjects(5, num_frames=40, size=(64, 64))
    assert _digest(short, [0, 3]) == _digest(long, [0, 3])
    assert len(long) == 40 and long.frame_names[39] == "00039"


def test_seeds_differ_and_a_caller_may_write_into_what_it_gets() -> None:
    video = MovingObjects(5, size=(64, 64))
    video.frame(0)[:] = 0
    video.masks(0)[1][:] = False
    assert video.frame(0).any() and video.masks(0)[1].any()
    assert _digest(video, [0]) != _digest(MovingObjects(6, size=(64, 64)), [0])


def test_a_mask_is_where_the_object_is_seen() -> None:
    """Paint an object in another colour: the frame changes on its mask and nowhere off it but at the soft edge."""
    size, checked = (128, 128), 0
    for seed in range(12):
        scene = replace(module._scene(seed, size, 3), shutter=0.0)
        frame, labels = module._compose(scene, size, 4)
        for object_id in range(1, scene.num_objects + 1):
            sprites = []
            for sprite in scene.sprites:
                picture = sprite.picture.copy()
                if sprite.object_id == object_id:
                    picture[..., :3] = picture[..., :3] ^ 128
                sprites.append(replace(sprite, picture=picture))
            painted = module._compose(replace(scene, sprites=sprites), size, 4)[0]
            changed = np.abs(painted.astype(int) - frame).max(-1) > 0
            mask = (labels == object_id).astype(np.uint8)
            inner, outer = cv2.erode(mask, np.ones((3, 3))) > 0, cv2.dilate(mask, np.ones((7, 7))) > 0
            assert (changed[inner]).mean() > 0.99 if inner.any() else True
            assert changed[~outer].sum() <= 0.1 * mask.sum()  # parts thinner than a pixel show and have no mask
            checked += bool(inner.any())
    assert checked > 10


def test_objects_are_hidden_leave_return_and_change_size() -> None:
    size, frames = (64, 64), range(0, 32, 2)
    objects = hidden = left = returned = resized = 0
    for seed in range(60):
        video = MovingObjects(seed, num_frames=32, size=size)
        scene = module._scene(seed, size, 3)
        seen = np.array([[mask.sum() for mask in video.masks(index).values()] for index in frames])
        alone = np.array([_unhidden(scene, size, index) for index in frames])
        visible = seen > 0
        objects += seen.shape[1]
        hidden += ((seen < 0.7 * alone) & (alone > 20)).any(0).sum()
        gone = np.maximum.accumulate(alone == 0)
        left += gone[-1].sum()
        returned += (gone & visible).any(0).sum()
        resized += (alone.max(0) > 2 * np.maximum(alone.min(0), 1)).sum()
    shares = {"hidden": hidden, "left": left, "returned": returned, "resized": resized}
    shares = {event: count / objects for event, count in shares.items()}
    assert shares["hidden"] > 0.2 and shares["left"] > 0.08 and shares["returned"] > 0.03 and shares["resized"] > 0.25


def _unhidden(scene: Any, size: tuple[int, int], index: int) -> list[int]:
    """The pixels of every object if nothing were in front of it."""
    view, areas = scene.view(index, size), []
    for object_id in range(1, scene.num_objects + 1):
        labels = np.zeros(size, np.uint8)
        for sprite in scene.sprites:
            if sprite.object_id == object_id:
                draw_sprite(np.zeros((*size, 3), np.uint8), labels, sprite, view, index)
        areas.append(int((labels > 0).sum()))
    return areas


def test_scenes_are_drawn_until_frame_0_obeys_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_AREA", 0.03)
    monkeypatch.setattr(module, "LARGEST_AREA", 0.05)
    _forget()
    areas = [m.mean() for seed in range(12) for m in MovingObjects(seed, size=(64, 64)).masks(0).values()]
    _forget()
    assert min(areas) >= 0.03 and max(areas) <= 0.05


def test_any_object_may_be_in_front() -> None:
    front = set()
    for seed in range(30):
        order = [sprite.object_id for sprite in module._scene(seed, (64, 64), 3).sprites if sprite.object_id]
        front |= {(near, far) for i, near in enumerate(order) for far in order[:i] if near != far}
    assert {(1, 2), (2, 1)} <= front


def test_the_splits_share_no_seed() -> None:
    names = [video.name for split in FIRST_SEED for video in moving_objects(split, 50, size=(64, 64))]
    assert len(set(names)) == 150
    assert [video.seed for video in moving_objects("val", 3)] == [10**9, 10**9 + 1, 10**9 + 2]
    starts = sorted(FIRST_SEED.values())
    assert np.diff(starts).min() >= module.SEEDS_PER_SPLIT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1; give a whole number of 0 or more"),
        ({"num_frames": 0}, "num_frames is 0; give a whole number from 1 to 100000"),
        ({"max_objects": 9}, "max_objects is 9; give a whole number from 1 to 8"),
        ({"size": (32, 64)}, "height is 32; give a whole number from 64 to 2048"),
        ({"size": (64, 4096)}, "width is 4096; give a whole number from 64 to 2048"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^MovingObjects: {message}$"):
        MovingObjects(**({"seed": 0} | arguments))


def test_a_wrong_split_or_count_says_what_is_allowed() -> None:
    with pytest.raises(UserError, match="split is 'dev'; allowed are train, val, test"):
        moving_objects("dev", 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="count is 0; give a whole number from 1 to 1000000000"):
        moving_objects("train", 0)


@pytest.mark.parametrize("index", [-1, 40])
def test_a_frame_outside_the_video_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"moving-0000000000: frame {index} of 40"):
        MovingObjects(0).frame(index)
