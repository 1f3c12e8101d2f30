"""Training clips: what is drawn, that it is a function of (seed, index), and Meta's batch made of them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import box, check, made
from training.utils.data_utils import Frame, Object, VideoDatapoint, collate_fn

from qsam2.data.clips import Clip, ClipDataset, Source, collate_clips
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.transforms import resize_masks, to_model_input


def clips(videos, count=40, **changes) -> list[Clip]:
    options = dict(num_frames=4, max_objects=3, image_size=16, length=count, augment=False)
    dataset = ClipDataset(videos, **(options | changes))
    return [dataset[i] for i in range(count)]


def same(a: Clip, b: Clip) -> bool:
    rest = (a.name, a.index, a.frame_indices, a.object_ids) == (b.name, b.index, b.frame_indices, b.object_ids)
    return rest and torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 99))
def test_an_item_is_a_function_of_seed_and_index(seed, index):
    videos = [made("a"), made("b", visible={3: range(4), 7: range(12), 9: range(12), 11: range(12)})]
    options = dict(num_frames=3, max_objects=2, image_size=16, length=100, max_stride=2, reverse=True, seed=seed)
    dataset = ClipDataset(videos, **options)
    first = dataset[index]
    dataset[(index + 1) % 100]
    assert same(first, dataset[index])
    assert same(first, pickle.loads(pickle.dumps(ClipDataset(videos, **options)))[index])


def test_items_differ_from_index_to_index_and_seed_to_seed():
    drawn = [clip.frame_indices for clip in clips([made()])]
    assert len(set(drawn)) == 9  # all starts of 4 frames in 12
    assert drawn != [clip.frame_indices for clip in clips([made()], seed=1)]
    steps = {c.frame_indices[1] - c.frame_indices[0] for c in clips([made()], max_stride=3, reverse=True)}
    assert steps == {-3, -2, -1, 1, 2, 3}
    augmented = clips([made(frames=4)], augment=True, count=3)
    assert not torch.equal(augmented[0].images, augmented[1].images)
    assert all(clip.masks[0].any() for clip in augmented)


def test_frames_and_masks_are_those_of_the_video():
    video = made(visible={1: range(12), 2: range(5)})
    for clip in clips([video]):
        assert clip.images.dtype == torch.float32 and clip.images.shape == (4, 3, 16, 16)
        assert clip.masks.dtype == torch.bool and clip.masks.shape == (4, len(clip.object_ids), 16, 16)
        for t, i in enumerate(clip.frame_indices):
            assert torch.equal(clip.images[t], to_model_input(video.frame(i), 16))
            masks = [video.masks(i).get(k, np.zeros(video.size, bool)) for k in clip.object_ids]
            assert torch.equal(clip.masks[t], resize_masks(np.stack(masks), 16))


@settings(max_examples=50)
@given(
    frames=st.integers(2, 9),
    num_frames=st.integers(1, 7),
    max_stride=st.integers(1, 4),
    reverse=st.booleans(),
    step=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_frames_follow_one_another_at_one_stride(frames, num_frames, max_stride, reverse, step, seed):
    annotated = list(range(0, frames * step, step))
    video = made(frames=frames * step, annotated=annotated)
    options = dict(num_frames=num_frames, max_stride=max_stride, reverse=reverse, seed=seed)
    for clip in clips([video], count=4, **options):
        steps = np.diff([annotated.index(i) for i in clip.frame_indices])
        assert len(clip.frame_indices) == num_frames
        if num_frames <= frames:
            assert len(set(steps)) <= 1
            assert all(1 <= s * np.sign(s) <= max_stride and (s > 0 or reverse) for s in steps)
        else:  # forth and back
            assert set(np.abs(steps)) == {1}


def test_forth_and_back():
    (clip,) = clips([made(frames=3)], count=1, num_frames=8)
    turned = [0, 1, 2, 1] * 4
    assert list(clip.frame_indices) in [turned[s : s + 8] for s in range(4)]
    (clip,) = clips([made(frames=5, annotated=[0])], count=1)
    assert clip.frame_indices == (0, 0, 0, 0)


def test_objects_are_visible_in_the_first_frame_and_at_most_as_many_as_asked():
    visible = {1: range(3), 5: range(2, 7), 6: range(12), 8: range(6), 9: ()}
    drawn = clips([made(visible=visible)], max_objects=2)
    for clip in drawn:
        assert clip.masks[0].any((1, 2)).all() and list(clip.object_ids) == sorted(set(clip.object_ids))
        assert all(clip.frame_indices[0] in visible[k] for k in clip.object_ids)
    assert {len(clip.object_ids) for clip in drawn} == {1, 2}


def test_a_start_where_nothing_is_visible_is_drawn_again():
    drawn = clips([made("never", visible={}), made("late", visible={2: range(8, 12)})], num_frames=2)
    assert {clip.name for clip in drawn} == {"late"}
    assert {clip.frame_indices for clip in drawn} == {(8, 9), (9, 10), (10, 11)}


def test_sources_are_drawn_by_weight():
    sources = [Source([made("rare")], 1.0), Source([made("a"), made("b")], 3.0)]
    names = [clip.name for clip in clips(sources, count=400)]
    assert 70 <= names.count("rare") <= 130  # a quarter of 400
    assert 110 <= names.count("a") <= 190


def test_a_still_becomes_a_moving_clip_but_stays_a_still_alone():
    still = made("still", frames=1)
    (alone,) = clips([still], count=1, num_frames=1)
    assert torch.equal(alone.images[0], to_model_input(still.frame(0), 16))
    moving = clips(moving_objects("train", 1, num_frames=1), count=3, image_size=64)
    for clip in moving:
        assert clip.masks[0].any() and not torch.equal(clip.images[0], clip.images[3])
    assert not torch.equal(moving[0].images, moving[1].images)


def test_a_source_may_stay_as_it_is_beside_others_that_are_augmented():
    sources = [Source([made("plain", frames=4)], augment=False), Source([made("turned", frames=4)])]
    augmented, as_is = clips(sources, augment=True), clips(sources)
    assert {clip.name for clip in augmented} == {"plain", "turned"}
    for a, b in zip(augmented, as_is, strict=True):
        assert same(a, b) == (a.name == "plain")


UNANNOTATED = made()
UNANNOTATED._masks = [None] * 12


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([made("a", visible={}), made("b", visible={1: ()})], "is visible in the first frame of 100 clips .* 2 videos"),
        ([made("empty", frames=1, visible={1: ()})], "no object is visible"),
        ([], "a source holds no videos"),
        ([Source([made()]), Source([])], "a source holds no videos"),
        ([Source([made()], 0.0)], "weight must be positive"),
        ([UNANNOTATED], "made: frame 000.. has no masks; .*must list its annotated_frames"),
    ],
)
def test_errors(videos, message):
    check(message, lambda: clips(videos))


def test_an_index_beyond_the_length_is_an_error():
    with pytest.raises(IndexError):
        ClipDataset([made()], num_frames=1, max_objects=1, image_size=16, length=3)[3]


def test_objects_too_small_for_the_model_are_left_out():
    video = made()
    pixel, large = box(video.size, 3, 3, 1, 1), np.ones(video.size, bool)
    video._masks = [{1: pixel, 2: large}] * 12
    for clip in clips([video], image_size=4):
        assert clip.object_ids == (2,) and clip.masks.shape[1] == 1 and clip.masks.all()
    video._masks = [{1: pixel}] * 12
    check("no object is visible", lambda: clips([video], image_size=4))


def test_a_batch_equals_metas_own_collation():
    batch = [clips([made(visible={k: range(12) for k in range(1, n + 1)})], count=1, seed=n)[0] for n in (1, 3, 2)]
    points = []
    for clip in batch:
        frames = []
        for t, i in enumerate(clip.frame_indices):
            objects = [Object(k, i, clip.masks[t, o]) for o, k in enumerate(clip.object_ids)]
            frames.append(Frame(data=clip.images[t], objects=objects))
        points.append(VideoDatapoint(frames=frames, video_id=clip.index, size=clip.size))
    ours, metas = collate_clips(batch), collate_fn(points, "all")
    assert ours.batch_size == metas.batch_size == torch.Size([4])
    assert ours.num_frames == 4 and ours.num_videos == 3 and ours.dict_key == metas.dict_key
    assert ours.masks.shape == (4, 6, 16, 16)
    for field in ("img_batch", "masks", "obj_to_frame_idx", "flat_obj_to_img_idx"):
        a, b = getattr(ours, field), getattr(metas, field)
        assert a.dtype == b.dtype and torch.equal(a, b), field
    for field in ("unique_objects_identifier", "frame_orig_size"):
        assert torch.equal(getattr(ours.metadata, field), getattr(metas.metadata, field)), field
