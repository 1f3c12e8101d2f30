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
from qsam2.evaluation.metrics.iou import Fidelity, MaskIoU
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
    "per_object": {IMAGE: {INSTANCE: {"point_IoU", "box_IoU"}}}, "seconds_per_frame"}; with the float model's masks of
    the same stills also "fidelity", over both prompts. For stills without true masks it is {"protocol": "fidelity",
    "prompts", "fidelity", "per_object": {IMAGE: {INSTANCE: {"fidelity"}}}, "instances", "images", "seconds_per_frame"}.

    Raises:
        UserError: no still shows an instance.
    """
    predictor, fidelity, has_truth = predictor_of(model), Fidelity(), has_masks(stills)
    scores = {prompt: MaskIoU() for prompt in PROMPTS}
    predictions: Predictions = {}
    seconds = []
    for still in tqdm(stills, desc="score stills"):
        masks = [mask for mask in (still.masks(0) or {}).values() if mask.any()]
        if not masks:
            continue
        frame, truth = still.frame(0), np.stack(masks)
        started = time.perf_counter()
        segmented = segment(predictor, frame, masks)
        seconds.append(time.perf_counter() - started)
        predictions[still.name, 0] = np.packbits(segmented)
        for prompt, of_prompt in zip(PROMPTS, segmented, strict=True):
            scores[prompt].update(still.name, of_prompt, truth)
        if reference is not None or not has_truth:
            packed = predictions if reference is None else reference
            other = np.unpackbits(packed[still.name, 0], count=segmented.size).reshape(segmented.shape).astype(bool)
            for k in range(len(masks)):
                fidelity.update(still.name, k, segmented[:, k], other[:, k])
    block: dict[str, Any]
    if not has_truth:
        counts = {"instances": sum(len(still.masks(0) or {}) for still in stills), "images": len(predictions)}
        block = {"protocol": "fidelity", "prompts": OWN_MASKS, **fidelity.compute(), **counts}
        return block | {"seconds_per_frame": float(np.mean(seconds))}, predictions
    block = {"protocol": "stills"}
    for prompt in PROMPTS:
        result = scores[prompt].compute()
        block[f"{prompt}_mIoU"] = result["IoU"]
        block[f"{prompt}_mIoU_images"] = result["IoU_images"]
    block |= {"instances": result["instances"], "images": result["images"], "per_object": _per_object(scores)}
    if reference is not None:
        block["fidelity"] = fidelity.compute()["fidelity"]
    return block | {"seconds_per_frame": float(np.mean(seconds))}, predictions


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


def _per_object(scores: dict[str, MaskIoU]) -> dict[str, dict[str, dict[str, float]]]:
    tables = {prompt: metric.table() for prompt, metric in scores.items()}
    return {
        image: {k: {f"{prompt}_IoU": float(100 * tables[prompt][image][k][0]) for prompt in PROMPTS} for k in instances}
        for image, instances in tables[PROMPTS[0]].items()
    }
