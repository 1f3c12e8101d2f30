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


@pytest.mark.parametrize(("memory", "correctable"), [({}, 0), (SHARED, 4)])
def test_bytes_are_constant(memory: dict[str, Any], correctable: int, model: SAM2) -> None:
    """Once pointers near the prompted and near the latest frames are apart; see `BoundedState`."""
    state = start(model, endless(48), bounded=True, correctable=correctable, **memory)
    seen = {index: state_bytes(state) for index, _, _ in model.propagate_in_video(state)}
    apart = 31 + max(correctable - 1, 0)
    assert len(seen) == 48
    assert {seen[index] for index in range(apart, 48)} == {seen[apart]}
    pointer_bytes = 4 * 128
    assert seen[apart] - seen[apart - 11] == 11 * pointer_bytes  # and nothing else before
    tracked, outputs = state["frames_tracked_per_obj"][0], state["output_dict_per_obj"][0]
    assert len(tracked) < 24 and len(outputs["non_cond_frame_outputs"]) < 44 and len(outputs["forgotten"].spans) < 4


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


CLICK = {"points": [[3.0, 4.0]], "labels": [1]}


def test_forgotten_frames_cannot_be_corrected_or_read(model: SAM2, message: Any) -> None:
    state = start(model, video(LENGTH), bounded=True, correctable=2)
    list(model.propagate_in_video(state))
    for action in (
        lambda: model.add_new_mask(state, 10, 1, box(4)),
        lambda: model.add_new_points_or_box(state, 12, 1, **CLICK),
        lambda: model.add_new_points_or_box(state, 21, 1, **CLICK),  # it is there, but not all that it reads
    ):
        assert "memory.correctable=N" in message(error_of(action))
    assert "can start at 0 to 7, 22 to 23;" in message(error_of(lambda: list(model.propagate_in_video(state, 18))))
    assert "has forgotten" in message(error_of(lambda: list(model.propagate_in_video(state, 9, reverse=True))))
    for frame in (22, 23, 5):  # the latest two and those around prompted ones are there
        model.add_new_points_or_box(state, frame, 1, **CLICK)
    model.add_new_points_or_box(state, 12, 2, **CLICK)  # a new object reads nothing
    masks = model.add_new_points_or_box(state, 13, 3, **CLICK)[2]
    assert masks.shape[0] == 3 and bool((masks[0] == -1024).all()) and bool((masks[2] != -1024).any())


def test_tracking_starts_by_itself_where_nothing_is_forgotten(model: SAM2, message: Any) -> None:
    """From the earliest prompt on, which may be another one than before."""
    state = start(model, video(LENGTH), bounded=True, correctable=0)
    model.add_new_mask(state, 20, 2, box(30))
    list(model.propagate_in_video(state))
    model.remove_object(state, 1)
    model.add_new_mask(state, 8, 3, box(10))
    assert "tracking from frame 8 reads frames" in message(error_of(lambda: list(model.propagate_in_video(state))))


@pytest.mark.parametrize("bounded", [False, True])
def test_frames_that_the_video_does_not_have(bounded: bool, model: SAM2, message: Any) -> None:
    state = start(model, video(4), bounded=bounded)
    for frame in (4, 400, -1, 1.5, "2", None):
        actions = [
            lambda frame=frame: model.add_new_points_or_box(state, frame, 2, **CLICK),
            lambda frame=frame: model.add_new_mask(state, frame, 2, box(4)),
            lambda frame=frame: model.clear_all_prompts_in_frame(state, frame, 1),
            lambda frame=frame: list(model.propagate_in_video(state, frame)),
        ]
        for action in actions if frame is not None else actions[:3]:
            assert error_of(action) == f"frame {frame!r}: the video has frames 0 to 3"
    assert "give 0 or more" in message(error_of(lambda: list(model.propagate_in_video(state, 0, -1))))
    assert "no object 2" in message(error_of(lambda: model.clear_all_prompts_in_frame(state, 0, 2)))
    assert "(height, width)" in message(error_of(lambda: model.add_new_mask(state, 0, 2, box(4)[None])))
    with pytest.raises(ValueError, match="must be provided together"):  # sam2's own
        model.add_new_points_or_box(state, 0, 2, points=[[3.0, 4.0]])
    assert state["obj_ids"] == [1] and len(follow(model, state, start_frame_idx=torch.tensor(1))) == 3
    stream = start(model, iter(video(2)), bounded=bounded)
    assert "0 on, as it is a stream" in message(error_of(lambda: model.add_new_mask(stream, -1, 1, box(4))))


@pytest.mark.parametrize("bounded", [False, True])
def test_a_correction_needs_a_prompt(bounded: bool, model: SAM2, message: Any) -> None:
    state = start(model, video(4), bounded=bounded)
    list(model.propagate_in_video(state))
    model.clear_all_prompts_in_frame(state, 0, 1)
    for prompt in (
        lambda: model.add_new_points_or_box(state, 2, 1, **CLICK),
        lambda: model.add_new_mask(state, 2, 1, box(4)),
    ):
        assert "its prompts were cleared" in message(error_of(prompt))
    model.add_new_mask(state, 0, 1, box(4))
    assert len(follow(model, state)) == 4


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
