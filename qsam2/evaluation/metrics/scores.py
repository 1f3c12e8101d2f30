"""Scores that collect one object after another: J&F of videos, and fidelity to a reference model."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    is a line of JSON in bytes, which every backend can gather.

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
        """As `update`."""
        name = (group, str(object_id))
        if name in self.names:
            raise UserError(f"{group}: object {object_id} was given twice; give all frames of an object in one update")
        self.names.add(name)
        line = json.dumps([*name, *map(float, values)]) + "\n"
        self.lines.append(torch.frombuffer(bytearray(line.encode()), dtype=torch.uint8).to(self.device))

    def table(self) -> Table:
        """The values as float64, sorted, so that results do not depend on the number of ranks.

        Raises UserError if there is no object.
        """
        text = dim_zero_cat(self.lines).cpu().numpy().tobytes().decode() if len(self.lines) else ""
        rows = {(group, item): values for group, item, *values in map(json.loads, filter(None, text.split("\n")))}
        if not rows:
            raise UserError(self.nothing)
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


class VOSScore(ObjectScores):
    """J&F, J and F over all objects of all sequences, in percent.

    Both protocols leave out the first and the last frame and average over frames, then over objects. ``davis``
    (Pont-Tuset et al. 2017) scores every object on all other frames. ``sav`` (Ravi et al. 2024) scores an object from
    the first of these on which it is in the true or the predicted masks, and leaves out objects never in the true ones.
    """

    def __init__(self, protocol: Protocol) -> None:
        if protocol not in get_args(Protocol):
            raise UserError(f"protocol: {protocol!r} is unknown; choose one of {', '.join(get_args(Protocol))}")
        super().__init__("J&F: no object was scored; the true masks show none between their first and last frame")
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
        table = self.table()
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

    def __init__(self) -> None:
        super().__init__("fidelity: no object was compared; give at least one object's masks")

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
        table = self.table()
        per_object = {
            sequence: {item: {"fidelity": float(100 * row[0])} for item, row in objects.items()}
            for sequence, objects in table.items()
        }
        return {"fidelity": float(100 * mean_over_objects(table)[0]), "per_object": per_object}
