"""The memory bank: the remembered frames and object pointers that a frame reads, and what can be forgotten."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sam2.modeling.sam2_utils import get_1d_sine_pe, select_closest_cond_frames
from torch import Tensor

from qsam2.errors import UserError
from qsam2.memory.cache import FrameMemory

if TYPE_CHECKING:
    from qsam2.models import SAM2

REMEMBERED, FORGOTTEN = "remembered", "forgotten"
"""Keys of an object's `Remembered` and its `Spans` of forgotten frames in its output dictionary, beside sam2's two."""
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

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def __contains__(self, time: int) -> bool:
        return any(first <= time <= last for first, last in self.spans)

    def add(self, time: int) -> None:
        """Put a frame into the set."""
        touched = [span for span in self.spans if span[0] - 1 <= time <= span[1] + 1]
        apart = [span for span in self.spans if span not in touched]
        ends = [time, *(end for span in touched for end in span)]
        self.spans = sorted([*apart, (min(ends), max(ends))])


class BoundedState:
    """A tracking state that does not grow: what no later frame can ask for is forgotten (ours).

    Keeps of each object: its conditioning frames; everything of the frames that a tracked frame can still read, those
    within reach of the current frame or of a conditioning frame on either side, from where tracking can start in the
    other direction; and object pointers as far as they are read. Bytes are constant where the windows of pointers
    around the prompted and the current frame are apart, from 2 * (max_obj_ptrs_in_encoder - 1) + 1 frames on.

    What was forgotten cannot be prompted or read again, which is an error rather than another mask.
    """

    def forget(self, model: SAM2, state: dict[str, Any], frame_idx: int) -> None:
        """After a frame was tracked."""
        for index, outputs in state["output_dict_per_obj"].items():
            others, prompted = outputs["non_cond_frame_outputs"], outputs["cond_frame_outputs"]
            forgotten = outputs.setdefault(FORGOTTEN, Spans())
            anchors = [frame_idx, *prompted]
            for time in [time for time in others if not _within(time, anchors, _reach(model))]:
                forgotten.add(time)
                if _within(time, anchors, model.max_obj_ptrs_in_encoder - 1):
                    others[time] = {**dict.fromkeys(others[time]), "obj_ptr": others[time]["obj_ptr"]}
                else:
                    del others[time]
            tracked = state["frames_tracked_per_obj"][index]
            for time in [time for time in tracked if time in forgotten and not _whole(outputs, time)]:
                del tracked[time]

    def check_prompt(self, model: SAM2, state: dict[str, Any], frame_idx: int, *, corrected: int | None) -> None:
        """Raises UserError where a frame that is prompted, or what a correction of that object reads, is forgotten."""
        what = f"prompting frame {frame_idx}"
        for index in state["output_dict_per_obj"]:
            self._check(state, index, [frame_idx], what)
        index = state["obj_id_to_idx"].get(corrected)
        tracked = state["frames_tracked_per_obj"].get(index, {}).get(frame_idx)
        if tracked is not None:
            self._check(state, index, _read_from(model, frame_idx, tracked["reverse"]), what)

    def check_start(self, model: SAM2, state: dict[str, Any], start: int, *, reverse: bool) -> None:
        """Raises UserError where tracking from a frame on would read what has been forgotten."""
        for index in state["output_dict_per_obj"]:
            self._check(state, index, _read_from(model, start, reverse), f"tracking from frame {start}")

    def _check(self, state: dict[str, Any], index: int, times: Iterable[int], what: str) -> None:
        outputs = state["output_dict_per_obj"][index]
        lost = [time for time in times if time in outputs.get(FORGOTTEN, ()) and not _whole(outputs, time)]
        if lost:
            raise UserError(
                f"{what} needs frame {lost[0]} of object {state['obj_idx_to_id'][index]}, which memory.bounded=true "
                "has forgotten: start at a prompted frame, correct the latest frame, or set memory.bounded=false"
            )


def _reach(model: SAM2) -> int:
    """Number of frames back to which memory features are read."""
    return (model.num_maskmem - 1) * model.memory_temporal_stride_for_eval


def _read_from(model: SAM2, frame_idx: int, reverse: bool) -> list[int]:
    return [frame_idx + (back if reverse else -back) for back in range(1, _reach(model) + 1)]


def _within(time: int, anchors: Iterable[int], reach: int) -> bool:
    return any(abs(time - anchor) <= reach for anchor in anchors)


def _whole(outputs: dict[str, Any], time: int) -> bool:
    output = outputs["cond_frame_outputs"].get(time) or outputs["non_cond_frame_outputs"].get(time)
    return output is not None and output["maskmem_features"] is not None
