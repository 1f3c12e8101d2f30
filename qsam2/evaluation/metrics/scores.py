"""Scores that collect one object after another: J&F of videos, and fidelity to a reference model."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch.distributed as dist

from qsam2.errors import UserError
from qsam2.evaluation.metrics.jf import boundary_accuracy, check_masks, region_similarity, statistics

Protocol = Literal["davis", "sav"]
Table = dict[str, dict[str, np.ndarray]]
"""{group: {object id: values, float64 (columns,)}}, e.g. of the objects of each sequence."""


class ObjectScores:
    """A few values for each object of each group, equal on every rank when they are read.

    Ranks may hold any objects, or none; one that a distributed sampler repeats in its last batch counts once.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[float, ...]] = {}

    def add(self, group: str, object_id: int | str, values: tuple[float, ...]) -> None:
        """Add one object's values. Raises UserError if this rank has the object already."""
        if (group, str(object_id)) in self.rows:
            raise UserError(f"{group}: object {object_id} was given twice; give all frames of an object in one update")
        self.rows[group, str(object_id)] = values

    def table(self, nothing: str) -> Table:
        """The values of all ranks, sorted, so that results do not depend on the number of ranks.

        Raises UserError with the text `nothing` if there is no object.
        """
        rows = self.rows
        if dist.is_available() and dist.is_initialized():
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, rows)
            rows = {name: values for of_rank in of_ranks for name, values in of_rank.items()}
        if not rows:
            raise UserError(nothing)
        table: Table = {}
        for group, object_id in sorted(rows, key=lambda key: (key[0], len(key[1]), key[1])):  # "2" before "10"
            table.setdefault(group, {})[object_id] = np.array(rows[group, object_id], dtype=np.float64)
        return table


def mean_over_objects(table: Table) -> np.ndarray:
    """Mean over all objects of all groups: float64 (columns,)."""
    return np.mean([row for group in table.values() for row in group.values()], axis=0)


class VOSScore(ObjectScores):
    """J&F, J and F over all objects of all sequences, in percent.

    Both protocols leave out the first and the last frame and average over frames, then over objects. ``davis``
    (Pont-Tuset et al. 2017) scores every object on all other frames. ``sav`` (Ravi et al. 2024) scores an object from
    the first of these on which it is in the true or the predicted masks, and leaves out objects never in the true ones.
    """

    def __init__(self, protocol: Protocol) -> None:
        if protocol not in get_args(Protocol):
            raise UserError(f"protocol: {protocol!r} is unknown; choose one of {', '.join(get_args(Protocol))}")
        super().__init__()
        self.protocol = protocol

    def update(self, sequence: str, object_id: int | str, pred: np.ndarray, true: np.ndarray) -> None:
        """Score one object of one sequence on all its annotated frames, the first and the last included.

        ``pred`` and ``true`` are bool (T, H, W), T >= 3; ``davis`` wants the objects of the first frame's mask, ids 1
        to its maximum. Raises UserError on another type, shape or number of frames, or an object that was added before.
        """
        check_masks(pred, true, f"{sequence}, object {object_id}")
        if len(true) < 3:
            raise UserError(
                f"{sequence}: {len(true)} annotated frames; at least 3 are needed, as the first and the last are not "
                "scored: leave this sequence out"
            )
        pred, true = pred[1:-1], true[1:-1]
        if self.protocol == "sav":
            if not true.any():
                return
            start = int(np.argmax((pred | true).any(axis=(1, 2))))
            pred, true = pred[start:], true[start:]
        j, f = statistics(region_similarity(pred, true)), statistics(boundary_accuracy(pred, true))
        self.add(sequence, object_id, (*j, *f))

    def compute(self) -> dict[str, Any]:
        """Scores in percent, as plain floats.

        {"protocol", "J&F", "J", "F", "J_recall", "J_decay", "F_recall", "F_decay", "per_object": {SEQUENCE: {OBJECT:
        {"J&F", "J", "F"}}}}. Recall and decay are DAVIS's; SA-V's evaluator has none, so they are taken in the same way
        from the frames it scores. Raises UserError if no object was scored.
        """
        table = self.table("J&F: no object was scored; the true masks show none between their first and last frame")
        j, j_recall, j_decay, f, f_recall, f_decay = (float(100 * value) for value in mean_over_objects(table))
        means = {"J_recall": j_recall, "J_decay": j_decay, "F_recall": f_recall, "F_decay": f_decay}
        per_object = {
            sequence: {item: _scores(float(100 * row[0]), float(100 * row[3])) for item, row in objects.items()}
            for sequence, objects in table.items()
        }
        return {"protocol": self.protocol, **_scores(j, f), **means, "per_object": per_object}


def _scores(j: float, f: float) -> dict[str, float]:
    return {"J&F": (j + f) / 2, "J": j, "F": f}


class Fidelity(ObjectScores):
    """Agreement of a model's masks with those of a reference model, in percent (ours): 100 if they are equal.

    Mean IoU over frames, then over objects; it needs no ground truth.
    """

    def update(self, sequence: str, object_id: int | str, masks: np.ndarray, reference_masks: np.ndarray) -> None:
        """Add one object of one sequence: bool (T, H, W) of both models, T >= 1, every frame counts.

        Raises UserError on another type or shape, or if the object was added before.
        """
        check_masks(masks, reference_masks, f"{sequence}, object {object_id}")
        self.add(sequence, object_id, (float(region_similarity(masks, reference_masks).mean()),))

    def compute(self) -> dict[str, Any]:
        """{"fidelity": mean over objects, "per_object": {SEQUENCE: {OBJECT: {"fidelity"}}}}, in percent.

        Raises UserError if there was no object.
        """
        table = self.table("fidelity: no object was compared; give at least one object's masks")
        per_object = {
            sequence: {item: {"fidelity": float(100 * row[0])} for item, row in objects.items()}
            for sequence, objects in table.items()
        }
        return {"fidelity": float(100 * mean_over_objects(table)[0]), "per_object": per_object}
