"""The memory bank that a frame reads: remembered frames and object pointers, as sam2 gives them to memory attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sam2.modeling.sam2_utils import get_1d_sine_pe, select_closest_cond_frames
from torch import Tensor

from qsam2.memory.cache import FrameMemory

if TYPE_CHECKING:
    from qsam2.models import SAM2

REMEMBERED = "remembered"
"""Key of an object's `Remembered` in its output dictionary, beside sam2's two."""
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


def gather(
    model: SAM2, output_dict: dict[str, Any], *, frame_idx: int, num_frames: int, reverse: bool, device: torch.device
) -> Bank:
    """The bank of a frame. Keys and values of frames that are not in it are forgotten."""
    prompted = output_dict["cond_frame_outputs"]
    if not prompted:
        raise ValueError(f"frame {frame_idx} is tracked before any frame was prompted")
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
    times = _times(model, frame_idx, reverse)
    recent = [recall(time, slot, others[time]) for slot, time in times if time in others]
    pointers, positions = None, None
    if model.use_obj_ptrs_in_encoder:
        pointers, positions = _pointers(model, near, others, frame_idx, num_frames, reverse, device)
    return Bank(conditioning, recent, pointers, positions, frozenset(prompted), remembered)


def _times(model: SAM2, frame_idx: int, reverse: bool) -> list[tuple[int, int]]:
    """(slot, frame) of the frames before this one in the order of tracking, the farthest first."""
    stride = 1 if model.training else model.memory_temporal_stride_for_eval
    sign = -1 if reverse else 1
    nearest = (sign * frame_idx - 2) // stride * stride
    strided = [(back - 1, sign * (nearest - (back - 2) * stride)) for back in range(model.num_maskmem - 1, 1, -1)]
    return [*strided, (0, frame_idx - sign)] if model.num_maskmem > 1 else []


def _pointers(
    model: SAM2,
    conditioning: Mapping[int, Any],
    others: Mapping[int, Any],
    frame_idx: int,
    num_frames: int,
    reverse: bool,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Object pointers as memory tokens and their temporal positions, each (B, tokens, C); None without any."""
    sign = -1 if reverse else 1
    limit = min(num_frames, model.max_obj_ptrs_in_encoder)
    only_past = not model.training and model.only_obj_ptrs_in_the_past_for_eval
    found = []
    for time, output in conditioning.items():
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
    positions = get_1d_sine_pe(torch.tensor(distances, device=device) / (limit - 1), dim=dim)
    positions = model.obj_ptr_tpos_proj(positions).repeat_interleave(pointers.shape[1] // count, dim=0)
    return pointers, positions.expand(batch, -1, -1)
