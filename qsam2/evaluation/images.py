"""Segmentation of stills from points and boxes, as SAM is scored on images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from qsam2.data.unlabelled import OWN_MASKS, has_masks
from qsam2.data.video import Predictions, Video
from qsam2.evaluation.metrics.jf import region_similarity
from qsam2.evaluation.metrics.scores import Fidelity, ObjectScores, mean_over_objects
from qsam2.evaluation.tracking import say_left_out
from qsam2.loading import predictor_of
from qsam2.models import SAM2

PROMPTS = ("point", "box")
ITEM_KEYS = ("point_IoU", "box_IoU")
"""Scores of an instance."""


def interior_point(mask: np.ndarray) -> np.ndarray:
    """The point of a mask, bool (H, W), that is farthest from its edge: float (1, 2), (x, y) in pixels.

    Of several the first in reading order: squares are integers, and the last bits of OpenCV's distances differ by call.
    """
    padded = np.pad(mask.astype(np.uint8), 1)  # the picture's border is an edge too
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    squared = np.rint(np.square(distance, dtype=np.float64))
    y, x = np.unravel_index(int(squared.argmax()), squared.shape)
    return np.array([[x, y]], dtype=np.float32)


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The smallest box around a mask, bool (H, W): float (4,), x0, y0, x1, y1 in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)


def score_stills(
    model: SAM2, stills: Sequence[Video], *, reference: Predictions | None = None
) -> tuple[dict[str, Any], Predictions]:
    """Mean IoU over instances from one click each and from one box each, in percent, and the masks of both.

    Three masks are asked for and the one with the highest predicted IoU counts. The block is {"protocol": "stills",
    "point_mIoU", "box_mIoU", "point_mIoU_images", "box_mIoU_images" (means over images), "instances", "images",
    "scored" (both), "left_out": {IMAGE: remarks}, "per_object": {IMAGE: {INSTANCE: {"point_IoU", "box_IoU"}}},
    "seconds_per_frame"}; with the float model's masks of the same stills also "fidelity", over both prompts. For stills
    without true masks it is {"protocol": "fidelity", "prompts", "fidelity", "per_object": {IMAGE: {INSTANCE:
    {"fidelity"}}}, "instances", "images", "scored", "left_out", "seconds_per_frame"}.

    Raises:
        UserError: no still shows an instance.
    """
    predictor, has_truth = predictor_of(model), has_masks(stills)
    scores = ObjectScores("mask IoU: no instance was scored; give images with at least one annotated instance")
    fidelity = Fidelity()
    predictions: Predictions = {}
    seconds = []
    for still in tqdm(stills, desc="score stills"):
        masks = [mask for mask in (still.masks(0) or {}).values() if mask.any()]
        if not masks:
            scores.leave_out(still.name, "shows no instance")
            continue
        frame, truth = still.frame(0), np.stack(masks)
        started = time.perf_counter()
        segmented = segment(predictor, frame, masks)
        seconds.append(time.perf_counter() - started)
        predictions[still.name, 0] = np.packbits(segmented)
        for k, of_prompts in enumerate(zip(*(region_similarity(found, truth) for found in segmented), strict=True)):
            scores.update(still.name, k, *of_prompts)
        if reference is not None or not has_truth:
            packed = predictions if reference is None else reference
            other = np.unpackbits(packed[still.name, 0], count=segmented.size).reshape(segmented.shape).astype(bool)
            for k in range(len(masks)):
                fidelity.update(still.name, k, segmented[:, k], other[:, k])
    table = scores.compute()
    counts = {"images": len(table), "instances": sum(map(len, table.values()))}
    remarks = {"scored": counts, "left_out": scores.left_out()}
    block: dict[str, Any] = {**counts, **remarks, "seconds_per_frame": float(np.mean(seconds))}
    if reference is None:
        say_left_out(remarks)
    if not has_truth:
        return {"protocol": "fidelity", "prompts": OWN_MASKS, **fidelity.compute(), **block}, predictions
    means = 100 * mean_over_objects(table)
    of_images = 100 * np.mean([np.mean(list(rows.values()), axis=0) for rows in table.values()], axis=0)
    for prompt, mean, of_image in zip(PROMPTS, means.tolist(), of_images.tolist(), strict=True):
        block |= {f"{prompt}_mIoU": mean, f"{prompt}_mIoU_images": of_image}
    per_object = {
        image: {k: dict(zip(ITEM_KEYS, (100 * row).tolist(), strict=True)) for k, row in rows.items()}
        for image, rows in table.items()
    }
    if reference is not None:
        block["fidelity"] = fidelity.compute()["fidelity"]
    return {"protocol": "stills", **block, "per_object": per_object}, predictions


def segment(predictor: SAM2ImagePredictor, frame: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Predicted masks from a point and from a box for each true mask: bool (prompts, masks, H, W)."""
    predictor.set_image(frame)
    found = np.zeros((len(PROMPTS), len(masks), *frame.shape[:2]), dtype=bool)
    for k, mask in enumerate(masks):
        point = {"point_coords": interior_point(mask), "point_labels": np.array([1])}
        for row, prompt in enumerate((point, {"box": tight_box(mask)})):
            candidates, confidence, _ = predictor.predict(**prompt, multimask_output=True)
            found[row, k] = candidates[confidence.argmax()] > 0
    return found
