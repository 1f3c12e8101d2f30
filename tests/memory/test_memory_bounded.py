"""A state that does not grow, streams of frames, and what can no longer be asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_videos import SIZE_PX, box, distance, follow, start, track_with, video
from torch import Tensor

from qsam2.benchmark.remembered_frames import state_bytes
from qsam2.errors import UserError
from qsam2.memory.bank import Spans
from qsam2.models import SAM2

LENGTH = 24
SHARED = {"cache": True, "sharing": "adaptive", "frames": 3}


def endless(length: int) -> Iterator[Tensor]:
    """A generator has no length."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(length):
        yield torch.randn(3, SIZE_PX, SIZE_PX, generator=generator)


@given(st.lists(st.integers(-20, 20)))
def test_spans_are_a_set(times: list[int]) -> None:
    spans = Spans()
    for time in times:
        spans.add(time)
    assert [time for time in range(-22, 23) if time in spans] == sorted(set(times))
    gaps = [later[0] - earlier[1] for earlier, later in zip(spans.spans, spans.spans[1:], strict=False)]
    assert all(gap > 1 for gap in gaps)


# The same masks


@pytest.mark.parametrize("memory", [{}, SHARED])
def test_masks_are_those_of_a_state_that_grows(memory: dict[str, Any], model: SAM2) -> None:
    """Two objects, a correction and a new prompt on the way, forward and back: see `track`."""
    growing = track_with(model, LENGTH, **memory)
    assert distance(track_with(model, LENGTH, **memory, bounded=True), growing) == 0


def test_tracking_again_from_the_first_prompt_gives_the_same(model: SAM2) -> None:
    state = start(model, video(LENGTH), bounded=True)
    assert distance(follow(model, state), follow(model, state)) == 0


def test_an_object_can_be_removed_and_a_state_reset(model: SAM2) -> None:
    results = []
    for bounded in (False, True):
        state = start(model, video(LENGTH), bounded=bounded)
        model.add_new_mask(state, 0, 2, box(30))
        list(model.propagate_in_video(state, max_frame_num_to_track=15))
        assert model.remove_object(state, 1)[0] == [2]
        masks = follow(model, state, start_frame_idx=15)
        model.reset_state(state)
        model.add_new_mask(state, 3, 1, box(10))
        results.append(masks | follow(model, state, "again"))
    assert distance(*results) == 0


def test_a_stream_gives_the_masks_of_a_sequence(model: SAM2) -> None:
    frames = video(LENGTH)
    sequence = follow(model, start(model, frames))
    stream = follow(model, start(model, iter(frames), cache=True, bounded=True))
    assert distance(sequence, stream) < 1e-5 and len(stream) == LENGTH


def test_a_stream_can_be_corrected_on_its_latest_frame(model: SAM2) -> None:
    results = []
    frames = video(17)  # object pointers of shorter videos are encoded otherwise, and a stream's length is unknown
    for given_frames in (frames, iter(frames)):
        state = start(model, given_frames, bounded=True)
        masks = {}
        for index, _, mask in model.propagate_in_video(state):
            masks["first", index] = mask
            if index == 12:
                break
        model.add_new_points_or_box(state, 12, 1, points=[[30.0, 20.0]], labels=[1])
        results.append(masks | follow(model, state, "later", start_frame_idx=13))
    assert distance(*results) == 0


# Bytes


@pytest.mark.parametrize("memory", [{}, SHARED])
def test_bytes_are_constant(memory: dict[str, Any], model: SAM2) -> None:
    """From frame 31 on, where pointers near the prompted and near the current frame are apart; see `BoundedState`."""
    state = start(model, endless(44), bounded=True, **memory)
    seen = {index: state_bytes(state) for index, _, _ in model.propagate_in_video(state)}
    assert len(seen) == 44
    assert {seen[index] for index in range(31, 44)} == {seen[31]}
    pointer_bytes = 4 * 128
    assert seen[31] - seen[20] == 11 * pointer_bytes  # and nothing else before
    tracked, outputs = state["frames_tracked_per_obj"][0], state["output_dict_per_obj"][0]
    assert len(tracked) < 20 and len(outputs["non_cond_frame_outputs"]) < 40 and len(outputs["forgotten"].spans) < 4


def test_bytes_of_an_unbounded_state_grow(model: SAM2) -> None:
    state = start(model, endless(24))
    seen = [state_bytes(state) for _ in model.propagate_in_video(state)]
    assert seen[-1] > seen[-2] > seen[-3]


# What can no longer be asked for


def error_of(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_forgotten_frames_cannot_be_prompted_or_read(model: SAM2) -> None:
    state = start(model, video(LENGTH), bounded=True)
    list(model.propagate_in_video(state))
    what = "of object 1, which memory.bounded=true has forgotten"
    assert f"prompting frame 10 needs frame 10 {what}" in error_of(lambda: model.add_new_mask(state, 10, 1, box(4)))
    click = {"points": [[3.0, 4.0]], "labels": [1]}
    assert what in error_of(lambda: model.add_new_points_or_box(state, 12, 2, **click))
    assert "tracking from frame 18 needs frame 16" in error_of(lambda: list(model.propagate_in_video(state, 18)))
    assert what in error_of(lambda: list(model.propagate_in_video(state, 9, reverse=True)))
    assert "prompting frame 22 needs frame 16" in error_of(lambda: model.add_new_points_or_box(state, 22, 1, **click))
    model.add_new_points_or_box(state, 22, 2, **click)  # a new object there reads nothing
    model.add_new_points_or_box(state, 23, 1, **click)  # the latest frame and those around prompted ones are there
    model.add_new_points_or_box(state, 5, 1, **click)


def test_frames_of_a_stream_that_are_not_there(model: SAM2) -> None:
    state = start(model, iter(video(LENGTH)))
    list(model.propagate_in_video(state))
    message = error_of(lambda: list(model.propagate_in_video(state)))
    assert message == (
        "frame 1 of the stream has passed, 17 to 23 are kept: prompt and track frames in their order, or give the "
        "video as a sequence"
    )
    state = start(model, iter(video(3)))
    expected = "frame 5 is past the end: the stream has 3 frames"
    assert error_of(lambda: model.add_new_mask(state, 5, 1, box(4))) == expected


def test_frames_of_changing_size(model: SAM2) -> None:
    frames = video(4)
    frames[2] = torch.zeros(3, SIZE_PX, 96)
    expected = "frame 2 of the video is (3, 64, 96), but this model's frames are (3, 64, 64): resize all frames alike"
    for given_frames in (frames, iter(frames)):
        state = start(model, given_frames)
        assert error_of(lambda state=state: list(model.propagate_in_video(state))) == expected


def test_a_state_of_another_model(model: SAM2) -> None:
    other = copy.deepcopy(model)
    state = start(model, video(3))
    expected = "this state was started by another model: start one with this model's init_state"
    assert error_of(lambda: other.add_new_mask(state, 0, 1, box(4))) == expected
    assert error_of(lambda: other.add_new_points_or_box(state, 0, 1, points=[[1.0, 1.0]], labels=[1])) == expected
    assert error_of(lambda: list(other.propagate_in_video(state))) == expected
