"""J&F of semi-supervised video object segmentation by the protocols of DAVIS-2017 and SA-V."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from qsam2.errors import UserError
from qsam2.evaluation.metrics.jf import Masks, boundary_accuracy, paired_masks, region_similarity, statistics
from qsam2.evaluation.metrics.rows import TableMetric, mean_over_objects

Protocol = Literal["davis", "sav"]


def check_protocol(protocol: str) -> None:
    """Raises UserError if ``protocol`` is unknown."""
    if protocol not in get_args(Protocol):
        raise UserError(f"protocol: {protocol!r} is unknown; choose one of {', '.join(get_args(Protocol))}")


class VOSScore(TableMetric):
    """J&F, J and F over all objects of all sequences, in percent.

    Both protocols leave out the first and the last frame and average over frames, then over objects. ``davis``
    (Pont-Tuset et al. 2017) scores every object on all other frames. ``sav`` (Ravi et al. 2024) scores an object from
    the first of these on which it is in the true or the predicted masks, and leaves out objects never in the true ones.
    """

    def __init__(self, protocol: Protocol, **kwargs: Any) -> None:
        check_protocol(protocol)
        super().__init__(columns=6, **kwargs)
        self.protocol = protocol

    def update(self, sequence: str, object_id: int | str, pred: Masks, true: Masks) -> None:
        """Score one object of one sequence on all its annotated frames, the first and the last included.

        ``pred`` and ``true`` are bool (T, H, W), T >= 3; ``davis`` wants the objects of the first frame's mask, ids 1
        to its maximum. Raises UserError on another type, shape or number of frames, or an object that was added before.
        """
        pred, true = paired_masks(pred, true, f"{sequence}, object {object_id}")
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
        self.add_row(sequence, object_id, (*j, *f))

    def compute(self) -> dict[str, Any]:
        """Scores in percent, as plain floats.

        {"protocol", "J&F", "J", "F", "J_recall", "J_decay", "F_recall", "F_decay", "per_object": {SEQUENCE: {OBJECT:
        {"J&F", "J", "F"}}}}. Recall and decay are DAVIS's; SA-V's evaluator has none, so they are taken in the same way
        from the frames it scores. Raises UserError if no object was scored.
        """
        table = self.table()
        if not table:
            raise UserError("J&F: no object was scored; the true masks show none between their first and last frame")
        j, j_recall, j_decay, f, f_recall, f_decay = (float(100 * value) for value in mean_over_objects(table))
        return {
            "protocol": self.protocol,
            **_scores(j, f),
            "J_recall": j_recall,
            "J_decay": j_decay,
            "F_recall": f_recall,
            "F_decay": f_decay,
            "per_object": {
                sequence: {
                    object_id: _scores(float(100 * row[0]), float(100 * row[3])) for object_id, row in objects.items()
                }
                for sequence, objects in table.items()
            },
        }


def _scores(j: float, f: float) -> dict[str, float]:
    return {"J&F": (j + f) / 2, "J": j, "F": f}
