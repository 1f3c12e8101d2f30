"""Scores that collect one object after another: J&F of videos, and fidelity to a reference model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from qsam2.errors import UserError
from qsam2.evaluation.metrics.jf import boundary_accuracy, check_masks, region_similarity, statistics

Protocol = Literal["davis", "sav"]
Table = dict[str, dict[str, np.ndarray]]
"""{group: {object id: values, float64 (columns,)}}, e.g. of the objects of each sequence."""


class ObjectScores(Metric):
    """A few values for each object of each group, equal on every rank when they are computed.

    Ranks may hold any objects, or none; one that a distributed sampler repeats in its last batch counts once. An object
    is a line of JSON in bytes, which every backend can gather; so is a remark on what was left out.

    Args:
        nothing: text of the UserError if there is no object.
    """

    full_state_update = False
    lines: list[Tensor]

    def __init__(self, nothing: str) -> None:
        super().__init__()
        self.nothing = nothing
        self.names: set[tuple[str, str]] = set()
        self.add_state("lines", default=[], dist_reduce_fx="cat")

    def update(self, group: str, object_id: int | str, *values: Any) -> None:
        """Add one object's values. Raises UserError if this rank has the object already."""
        self.add(group, object_id, values)

    def compute(self) -> Any:
        """The values of all ranks, see `table`."""
        return self.table()

    def add(self, group: str, object_id: int | str, values: Sequence[float]) -> None:
        """Add one object's values, as `update` of this class does; for subclasses, whose `update` takes masks."""
        name = (group, str(object_id))
        if name in self.names:
            raise UserError(f"{group}: object {object_id} was given twice; give all frames of an object in one update")
        self.names.add(name)
        self._append([*name, *map(float, values)])

    def leave_out(self, group: str, what: str) -> None:
        """Remark that something of a group is not scored, and why."""
        self._append([group, what])

    def left_out(self) -> dict[str, list[str]]:
        """Remarks on what is not scored, {group: remarks}, sorted."""
        found: dict[str, list[str]] = {}
        for group, what in sorted({(line[0], line[1]) for line in self._gathered() if len(line) == 2}):
            found.setdefault(group, []).append(what)
        return found

    def _append(self, line: list[Any]) -> None:
        text = json.dumps(line) + "\n"
        self.lines.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device))

    def _gathered(self) -> list[list[Any]]:
        text = dim_zero_cat(self.lines).cpu().numpy().tobytes().decode() if len(self.lines) else ""
        return [json.loads(line) for line in text.split("\n") if line]

    def table(self) -> Table:
        """The values as float64, sorted, so that results do not depend on the number of ranks.

        Raises UserError, with what was left out, if there is no object.
        """
        rows = {(group, item): values for group, item, *values in self._gathered() if values}
        if not rows:
            raise UserError("; ".join([self.nothing, *remarks(self.left_out())]))
        table: Table = {}
        for group, object_id in sorted(rows, key=lambda key: (key[0], len(key[1]), key[1])):  # "2" before "10"
            table.setdefault(group, {})[object_id] = np.array(rows[group, object_id], dtype=np.float64)
        return table

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the objects of all ranks."""
        if not len(self.lines):  # torchmetrics would send an empty vector of floats
            self.lines = [torch.full((1,), ord("\n"), dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget all objects."""
        super().reset()
        self.names = set()


def mean_over_objects(table: Table) -> np.ndarray:
    """Mean over all objects of all groups: float64 (columns,)."""
    return np.mean([row for group in table.values() for row in group.values()], axis=0)


def remarks(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Remarks on what is not scored as text, "VIDEO: WHAT"; of many the first three."""
    texts = [f"{group}: {what}" for group, reasons in left_out.items() for what in reasons]
    return [*texts[:3], *([f"and {len(texts) - 3} more, see left_out in the scores"] if len(texts) > 3 else [])]


def amount_text(block: Mapping[str, Any]) -> str:
    """Amount of data behind a score block: "7 videos, 350 frames, 7 objects"; of stills their images and instances."""
    counts = block.get("scored")
    if counts is None and (objects := block.get("per_object")):  # of a run of an earlier version
        units = ("images", "instances") if block.get("protocol") == "stills" else ("videos", "objects")
        counts = dict(zip(units, (len(objects), sum(map(len, objects.values()))), strict=True))
    return ", ".join(f"{count} {what[:-1] if count == 1 else what}" for what, count in (counts or {}).items())


def amount(table: Table) -> dict[str, int]:
    """Amount of data that was scored; a row of the table ends with its object's number of frames.

    Frames of a video are those on which the object that is scored on most of them is.
    """
    frames = sum(int(max(row[-1] for row in group.values())) for group in table.values())
    return {"videos": len(table), "frames": frames, "objects": sum(map(len, table.values()))}


class VOSScore(ObjectScores):
    """J&F, J and F over all objects of all sequences, in percent.

    Both protocols leave out the first and the last frame and average over frames, then over objects. ``davis``
    (Pont-Tuset et al. 2017) scores an object on the frames after the one that prompts it, the first that shows it in
    the true masks; of DAVIS's own objects that is always the first frame, and the scores are those of its evaluator.
    ``sav`` (Ravi et al. 2024) scores an object from the first frame, the very first left out, on which it is in the
    true or the predicted masks. What has no frame to be scored on is left out, see `left_out`.
    """

    def __init__(self, protocol: Protocol) -> None:
        if protocol not in get_args(Protocol):
            raise UserError(f"protocol: {protocol!r} is unknown; choose one of {', '.join(get_args(Protocol))}")
        super().__init__("J&F: no object was scored; the true masks show none between their first and last frame")
        self.protocol = protocol

    def update(self, sequence: str, object_id: int | str, pred: np.ndarray, true: np.ndarray) -> None:
        """Score one object of one sequence on all its annotated frames, the first and the last included.

        ``pred`` and ``true`` are bool (T, H, W), T >= 3. Raises UserError on another type, shape or number of frames,
        or an object that was added before.
        """
        check_masks(pred, true, f"{sequence}, object {object_id}")
        if len(true) < 3:
            raise UserError(
                f"{sequence}: {len(true)} annotated frames; at least 3 are needed, as the first and the last are not "
                "scored: leave this sequence out"
            )
        shown = np.any(true, axis=(1, 2))
        start = self._first_scored(shown, np.any(pred, axis=(1, 2)))
        pred, true = pred[start:-1], true[start:-1]
        if not len(true):
            late = (
                f"is seen first in annotated frame {np.argmax(shown) + 1} of {len(shown)}, and the last is not scored"
            )
            never = "is in no true mask between the first and the last"
            self.leave_out(sequence, f"object {object_id} {late if shown[1:-1].any() else never}")
            return
        j, f = statistics(region_similarity(pred, true)), statistics(boundary_accuracy(pred, true))
        self.add(sequence, object_id, (*j, *f, len(true)))

    def _first_scored(self, shown: np.ndarray, predicted: np.ndarray) -> int:
        """Index of the first frame to score an object on, by where its true and predicted masks show it: bool (T,)."""
        if self.protocol == "davis" and shown.any():
            return int(np.argmax(shown)) + 1
        if self.protocol == "sav" and shown[1:-1].any():
            return int(np.argmax((shown | predicted)[1:-1])) + 1
        return len(shown)

    def compute(self) -> dict[str, Any]:
        """Scores in percent, as plain floats.

        {"protocol", "J&F", "J", "F", "J_recall", "J_decay", "F_recall", "F_decay", "scored": {"videos", "frames",
        "objects"}, "left_out": {SEQUENCE: remarks}, "per_object": {SEQUENCE: {OBJECT: {"J&F", "J", "F"}}}}. Recall and
        decay are DAVIS's; SA-V's evaluator has none, so they are taken in the same way from the frames it scores.
        Raises UserError if no object was scored.
        """
        table = self.table()
        j, j_recall, j_decay, f, f_recall, f_decay = (float(100 * value) for value in mean_over_objects(table)[:6])
        means = {"J_recall": j_recall, "J_decay": j_decay, "F_recall": f_recall, "F_decay": f_decay}
        per_object = {
            sequence: {item: _scores(float(100 * row[0]), float(100 * row[3])) for item, row in objects.items()}
            for sequence, objects in table.items()
        }
        counts = {"scored": amount(table), "left_out": self.left_out()}
        return {"protocol": self.protocol, **_scores(j, f), **means, **counts, "per_object": per_object}


def _scores(j: float, f: float) -> dict[str, float]:
    return {"J&F": (j + f) / 2, "J": j, "F": f}


class Fidelity(ObjectScores):
    """Agreement of a model's masks with those of a reference model, in percent (ours): 100 if they are equal.

    Mean IoU over frames, then over objects; it needs no ground truth.
    """

    def __init__(self) -> None:
        super().__init__("fidelity: no object was compared; give at least one object's masks")

    def update(self, sequence: str, object_id: int | str, masks: np.ndarray, reference_masks: np.ndarray) -> None:
        """Add one object of one sequence: bool (T, H, W) of both models, T >= 1, every frame counts.

        Raises UserError on another type or shape, or if the object was added before.
        """
        check_masks(masks, reference_masks, f"{sequence}, object {object_id}")
        self.add(sequence, object_id, (float(region_similarity(masks, reference_masks).mean()), len(masks)))

    def compute(self) -> dict[str, Any]:
        """{"fidelity": mean over objects, in percent, "scored", "per_object": {SEQUENCE: {OBJECT: {"fidelity"}}}}.

        Raises UserError if there was no object.
        """
        table = self.table()
        per_object = {
            sequence: {item: {"fidelity": float(100 * row[0])} for item, row in objects.items()}
            for sequence, objects in table.items()
        }
        return {"fidelity": float(100 * mean_over_objects(table)[0]), "scored": amount(table), "per_object": per_object}
