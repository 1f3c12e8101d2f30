"""The memory bank: the remembered frames and object pointers that a frame reads, and what can be forgotten."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from sam2.modeling.sam2_utils import get_1d_sine_pe, select_closest_cond_frames
from torch import Tensor

from qsam2.errors import UserError
from qsam2.memory.cache import FrameMemory

if TYPE_CHECKING:
    from qsam2.models import SAM2

log = logging.getLogger("qsam2")

REMEMBERED, FORGOTTEN = "remembered", "forgotten"
"""Keys of an object's `Remembered` and its `Spans` of forgotten frames in its output dictionary, beside sam2's two."""
NO_MASK = torch.full((1, 1, 1, 1), NO_OBJ_SCORE)
"""Mask logits of a forgotten frame, which sam2 resizes: those that it has for an object without a mask."""
HISTORY = 256
"""How many similarities of a video a quantile is taken over: the latest, so that the state does not grow."""


@dataclass
class Remembered:
    """State that an object (or a training batch of objects) keeps from frame to frame besides sam2's outputs."""

    frames: dict[int, FrameMemory] = field(default_factory=dict)
    similarities: list[deque[float]] = field(default_factory=list)
    """The latest similarities of neighbouring frames, an object each."""
    temporal_keys: dict[int, Tensor] = field(default_factory=dict)
    """Of a training clip, by layer."""


@dataclass(frozen=True)
class Bank:
    """Remembered frames and object pointers that one frame can read, oldest frame first.

    `conditioning` are the prompted frames, `recent` the others; `pointers` and their positions: (B, tokens, C).
    """

    conditioning: list[FrameMemory]
    recent: list[FrameMemory]
    pointers: Tensor | None
    pointer_positions: Tensor | None
    prompted_times: frozenset[int]
    remembered: Remembered


def gather(model: SAM2, output_dict: dict[str, Any], *, frame_idx: int, num_frames: int, reverse: bool) -> Bank:
    """The bank of a frame. Keys and values of frames that are not in it are forgotten."""
    prompted = output_dict["cond_frame_outputs"]
    near, far = select_closest_cond_frames(frame_idx, prompted, model.max_cond_frames_in_attn)
    others = {**far, **output_dict["non_cond_frame_outputs"]}
    remembered: Remembered = output_dict.setdefault(REMEMBERED, Remembered())
    kept, remembered.frames = remembered.frames, {}

    def recall(time: int, slot: int, output: Mapping[str, Any]) -> FrameMemory:
        features, position = output["maskmem_features"], output["maskmem_pos_enc"][-1]
        memory = kept.get(time)
        if memory is None or memory.features is not features:  # prompted or tracked again since
            memory = FrameMemory(time, slot, features, position)
        memory.slot = slot
        remembered.frames[time] = memory
        return memory

    conditioning = [recall(time, model.num_maskmem - 1, output) for time, output in near.items()]
    stride = 1 if model.training else model.memory_temporal_stride_for_eval
    sign = -1 if reverse else 1
    nearest = (sign * frame_idx - 2) // stride * stride
    # (slot, frame) of the frames before this one in the order of tracking, the farthest first
    times = [(back - 1, sign * (nearest - (back - 2) * stride)) for back in range(model.num_maskmem - 1, 1, -1)]
    if model.num_maskmem > 1:
        times.append((0, frame_idx - sign))
    recent = [recall(time, slot, others[time]) for slot, time in times if time in others]
    pointers, positions = None, None
    if model.use_obj_ptrs_in_encoder:
        pointers, positions = _pointers(model, near, others, frame_idx, num_frames, sign)
    return Bank(conditioning, recent, pointers, positions, frozenset(prompted), remembered)


def _pointers(
    model: SAM2, near: Mapping[int, Any], others: Mapping[int, Any], frame_idx: int, num_frames: int, sign: int
) -> tuple[Tensor | None, Tensor | None]:
    """Object pointers as memory tokens and their temporal positions, each (B, tokens, C); None without any."""
    limit = min(num_frames, model.max_obj_ptrs_in_encoder)
    only_past = not model.training and model.only_obj_ptrs_in_the_past_for_eval
    found = []
    for time, output in near.items():
        distance = (frame_idx - time) * sign
        if distance >= 0 or not only_past:
            found.append((distance if model.use_signed_tpos_enc_to_obj_ptrs else abs(distance), output["obj_ptr"]))
    for back in range(1, limit):
        time = frame_idx - sign * back
        if time in others and 0 <= time < num_frames:
            found.append((back, others[time]["obj_ptr"]))
    if not found:
        return None, None
    distances, values = zip(*found, strict=True)
    pointers = torch.stack(values, dim=1)  # (B, pointers, hidden)
    batch, count, hidden = pointers.shape
    pointers = pointers.reshape(batch, -1, model.mem_dim)  # a pointer is hidden / mem_dim tokens
    if not model.add_tpos_enc_to_obj_ptrs:
        return pointers, torch.zeros_like(pointers)
    dim = hidden if model.proj_tpos_enc_in_obj_ptrs else model.mem_dim
    positions = get_1d_sine_pe(torch.tensor(distances, device=pointers.device) / (limit - 1), dim=dim)
    positions = model.obj_ptr_tpos_proj(positions).repeat_interleave(pointers.shape[1] // count, dim=0)
    return pointers, positions.expand(batch, -1, -1)


class Spans:
    """A set of frame numbers, kept as spans of neighbours."""

    def __init__(self, times: Iterable[int] = ()) -> None:
        self.spans: list[tuple[int, int]] = []
        for time in times:
            self.add(time)

    def __str__(self) -> str:
        if not self.spans:
            return "no frame"
        return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in self.spans)

    def __contains__(self, time: int) -> bool:
        return any(first <= time <= last for first, last in self.spans)

    def add(self, time: int) -> None:
        """Put a frame into the set."""
        touched = [span for span in self.spans if span[0] - 1 <= time <= span[1] + 1]
        apart = [span for span in self.spans if span not in touched]
        ends = [time, *(end for span in touched for end in span)]
        self.spans = sorted([*apart, (min(ends), max(ends))])


class BoundedState:
    """A tracking state that does not grow: what no later frame or correction can ask for is forgotten (ours).

    Kept of each object are its conditioning frames, and all that tracking or a correction reads on either side of them,
    of the current frame and of the `correctable` frames that were tracked last: memory features up to `num_maskmem` - 1
    frames away, object pointers up to `max_obj_ptrs_in_encoder` - 1. Bytes are constant once the windows of pointers
    around the prompted and the latest frames are apart.

    A new object reads nothing of the others and can be prompted on any frame. What reads a forgotten frame is an error
    rather than another mask.
    """

    def __init__(self, correctable: int) -> None:
        self.correctable = correctable

    def forget(self, model: SAM2, state: dict[str, Any], frame_idx: int) -> None:
        """After a frame was tracked."""
        for index, outputs in state["output_dict_per_obj"].items():
            others, tracked = outputs["non_cond_frame_outputs"], state["frames_tracked_per_obj"][index]
            if frame_idx in tracked:
                tracked[frame_idx] = tracked.pop(frame_idx)  # in the order of tracking, the latest last
            latest = itertools.islice(reversed(tracked), self.correctable)
            anchors = {frame_idx, *outputs["cond_frame_outputs"], *latest}
            forgotten = outputs.setdefault(FORGOTTEN, Spans())
            for time in list(others):
                distance = min(abs(time - anchor) for anchor in anchors)
                if distance <= _reach(model):
                    continue
                forgotten.add(time)
                if distance < model.max_obj_ptrs_in_encoder:
                    pointer = others[time]["obj_ptr"]
                    others[time] = {**dict.fromkeys(others[time]), "obj_ptr": pointer, "pred_masks": NO_MASK}
                else:
                    del others[time]
            for time in [time for time in tracked if time in forgotten and not _whole(outputs, time)]:
                del tracked[time]

    def check_prompt(self, model: SAM2, state: dict[str, Any], frame_idx: int, obj_id: int, *, reads: bool) -> None:
        """Raises UserError where an object's frame, or what its correction reads (a mask does not), is forgotten."""
        for index, outputs in state["output_dict_per_obj"].items():
            if _is_lost(outputs, frame_idx) and (other := state["obj_idx_to_id"][index]) != obj_id:
                log.warning("frame %d of object %s is forgotten: its mask there is returned empty", frame_idx, other)
        index = state["obj_id_to_idx"].get(obj_id)
        if index is None:
            return
        outputs, tracked = state["output_dict_per_obj"][index], state["frames_tracked_per_obj"][index]

        def is_correctable(time: int) -> bool:
            reverse = tracked[time]["reverse"] if reads and time in tracked else None
            return not _is_lost(outputs, time) and (reverse is None or _can_read(model, outputs, time, reverse))

        if not is_correctable(frame_idx):
            others = filter(is_correctable, _frames_of(outputs))
            raise UserError(
                f"frame {frame_idx} of object {obj_id} cannot be corrected, memory.bounded=true has forgotten it or "
                f"frames that it reads: {Spans(others)} can; memory.correctable=N keeps the latest N, "
                "memory.bounded=false all"
            )

    def check_start(self, model: SAM2, state: dict[str, Any], start: int, *, reverse: bool) -> None:
        """Raises UserError where tracking from a frame on would read what has been forgotten."""
        every = state["output_dict_per_obj"].values()

        def can_start(time: int) -> bool:
            return all(_can_read(model, outputs, time, reverse) for outputs in every)

        if not can_start(start):
            known = {time + step for outputs in every for time in _frames_of(outputs) for step in (-1, 0, 1)}
            possible = (time for time in known if 0 <= time < state["num_frames"] and can_start(time))
            raise UserError(
                f"tracking from frame {start} reads frames that memory.bounded=true has forgotten: it can start at "
                f"{Spans(possible)}; memory.correctable=N keeps the latest N, memory.bounded=false all"
            )


def _reach(model: SAM2) -> int:
    """Number of frames back to which memory features are read."""
    return (model.num_maskmem - 1) * model.memory_temporal_stride_for_eval


def _can_read(model: SAM2, outputs: dict[str, Any], frame_idx: int, reverse: bool) -> bool:
    """True if nothing is forgotten that an object reads on a frame: memory features, and pointers further back."""
    forgotten = outputs.get(FORGOTTEN, ())
    for back in range(1, max(_reach(model) + 1, model.max_obj_ptrs_in_encoder)):
        time = frame_idx + (back if reverse else -back)
        is_there = _whole(outputs, time) if back <= _reach(model) else time in _frames_of(outputs)
        if time in forgotten and not is_there:
            return False
    return True


def _frames_of(outputs: dict[str, Any]) -> set[int]:
    return {*outputs["cond_frame_outputs"], *outputs["non_cond_frame_outputs"]}


def _is_lost(outputs: dict[str, Any], time: int) -> bool:
    return time in outputs.get(FORGOTTEN, ()) and not _whole(outputs, time)


def _whole(outputs: dict[str, Any], time: int) -> bool:
    output = outputs["cond_frame_outputs"].get(time) or outputs["non_cond_frame_outputs"].get(time)
    return output is not None and output["maskmem_features"] is not None
