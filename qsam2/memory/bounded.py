"""A tracking state that does not grow: what no later frame can ask for is forgotten (ours)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qsam2.errors import UserError

if TYPE_CHECKING:
    from qsam2.models import SAM2

FORGOTTEN = "forgotten"
"""Key of an object's `Spans` of forgotten frames in its output dictionary, beside sam2's two."""


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
    """Keeps of each object: its conditioning frames; everything of the frames that a tracked frame can still read,
    those within reach of the current frame or of a conditioning frame on either side, from where tracking can start in
    the other direction; and object pointers as far as they are read. Bytes are constant where the windows of pointers
    around the prompted and the current frame are apart, from 2 * (max_obj_ptrs_in_encoder - 1) + 1 frames on.

    What was forgotten cannot be prompted or read again, which is an error rather than another mask.
    """

    def forget(self, model: SAM2, state: dict[str, Any], frame_idx: int) -> None:
        """After a frame was tracked."""
        for index, outputs in state["output_dict_per_obj"].items():
            others, prompted = outputs["non_cond_frame_outputs"], outputs["cond_frame_outputs"]
            forgotten = outputs.setdefault(FORGOTTEN, Spans())
            anchors = [frame_idx, *prompted]
            for time in [time for time in others if not _within(time, anchors, memory_reach(model))]:
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


def memory_reach(model: SAM2) -> int:
    """Number of frames back to which memory features are read."""
    return (model.num_maskmem - 1) * model.memory_temporal_stride_for_eval


def _read_from(model: SAM2, frame_idx: int, reverse: bool) -> list[int]:
    return [frame_idx + (back if reverse else -back) for back in range(1, memory_reach(model) + 1)]


def _within(time: int, anchors: Iterable[int], reach: int) -> bool:
    return any(abs(time - anchor) <= reach for anchor in anchors)


def _whole(outputs: dict[str, Any], time: int) -> bool:
    output = outputs["cond_frame_outputs"].get(time) or outputs["non_cond_frame_outputs"].get(time)
    return output is not None and output["maskmem_features"] is not None
