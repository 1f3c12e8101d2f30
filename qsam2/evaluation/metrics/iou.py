"""Intersection over union of masks: segmentation scores of images, and fidelity to a reference model."""

from __future__ import annotations

from typing import Any

import numpy as np

from qsam2.errors import UserError
from qsam2.evaluation.metrics.jf import Masks, paired_masks, region_similarity
from qsam2.evaluation.metrics.rows import TableMetric, mean_over_objects


def mask_iou(pred: Masks, true: Masks) -> np.ndarray:
    """Intersection over union of each pair of masks, 1 where the union is empty.

    ``pred`` and ``true`` are bool (N, H, W). Returns float64 (N,) in 0-1. Raises UserError on another type or shape.
    """
    return region_similarity(pred, true)


class MaskIoU(TableMetric):
    """Mean IoU of single masks, in percent: over all instances, and over images (each the mean of its instances)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(columns=1, **kwargs)

    def update(self, image: str, pred: Masks, true: Masks) -> None:
        """Add all instances of one image: ``pred`` and ``true`` are bool (N, H, W), N >= 0, in the same order.

        Raises UserError on another type or shape, or if the image was added before.
        """
        for instance, iou in enumerate(mask_iou(*paired_masks(pred, true, image))):
            self.add_row(image, instance, (iou,))

    def compute(self) -> dict[str, Any]:
        """{"IoU": mean over instances, "IoU_images": mean over images, "instances", "images": their numbers}.

        Raises UserError if there was no instance.
        """
        table = self.table()
        if not table:
            raise UserError("mask IoU: no instance was scored; give images with at least one annotated instance")
        per_image = [np.mean(list(instances.values())) for instances in table.values()]
        return {
            "IoU": float(100 * mean_over_objects(table)[0]),
            "IoU_images": float(100 * np.mean(per_image)),
            "instances": sum(len(instances) for instances in table.values()),
            "images": len(table),
        }


class Fidelity(TableMetric):
    """Agreement of a model's masks with those of a reference model, in percent (ours): 100 if they are equal.

    Mean IoU over frames, then over objects; it needs no ground truth.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(columns=1, **kwargs)

    def update(self, sequence: str, object_id: int | str, masks: Masks, reference_masks: Masks) -> None:
        """Add one object of one sequence: bool (T, H, W) of both models, T >= 1, every frame counts.

        Raises UserError on another type or shape, on no frames, or if the object was added before.
        """
        masks, reference_masks = paired_masks(masks, reference_masks, f"{sequence}, object {object_id}")
        if not len(masks):
            raise UserError(f"{sequence}, object {object_id}: no frames; fidelity needs at least one")
        self.add_row(sequence, object_id, (float(mask_iou(masks, reference_masks).mean()),))

    def compute(self) -> dict[str, Any]:
        """{"fidelity": mean over objects, "per_object": {SEQUENCE: {OBJECT: {"fidelity"}}}}, in percent.

        Raises UserError if there was no object.
        """
        table = self.table()
        if not table:
            raise UserError("fidelity: no object was compared; give at least one object's masks")
        return {
            "fidelity": float(100 * mean_over_objects(table)[0]),
            "per_object": {
                sequence: {object_id: {"fidelity": float(100 * row[0])} for object_id, row in objects.items()}
                for sequence, objects in table.items()
            },
        }
