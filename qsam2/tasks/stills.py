"""Segmentation of stills from points and boxes, as SAM is scored on images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.metrics.iou import MaskIoU
from qsam2.models import SAM2


def image_predictor(model: SAM2) -> SAM2ImagePredictor:
    """`sam2`'s image predictor over our model, at the model's own resolution (`sam2` assumes 1024 px)."""
    predictor = SAM2ImagePredictor(model)
    side = model.image_size // 4
    predictor._bb_feat_sizes = [(side >> level, side >> level) for level in range(3)]
    return predictor


def interior_point(mask: np.ndarray) -> np.ndarray:
    """The point of a mask, bool (H, W), that is farthest from its edge: float (1, 2), (x, y) in pixels."""
    padded = np.pad(mask.astype(np.uint8), 1)  # the picture's border is an edge too
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return np.array([[x, y]], dtype=np.float32)


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The smallest box around a mask, bool (H, W): float (4,), x0, y0, x1, y1 in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)


def score_stills(model: SAM2, stills: Sequence[Video]) -> dict[str, Any]:
    """Mean IoU over instances from one click each and from one box each, in percent.

    Three masks are asked for and the one with the highest predicted IoU counts. Returns {"protocol": "stills",
    "point_mIoU", "box_mIoU", "point_mIoU_images", "box_mIoU_images" (means over images), "instances", "images",
    "seconds_per_frame"}.

    Raises:
        UserError: no still shows an instance.
    """
    predictor = image_predictor(model)
    scores = {"point": MaskIoU(), "box": MaskIoU()}
    started = time.perf_counter()
    for still in tqdm(stills, desc="score stills"):
        masks = [mask for mask in (still.masks(0) or {}).values() if mask.any()]
        if not masks:
            continue
        predictor.set_image(still.frame(0))
        predicted: dict[str, list[np.ndarray]] = {"point": [], "box": []}
        for mask in masks:
            point = {"point_coords": interior_point(mask), "point_labels": np.array([1])}
            for prompt, values in (("point", point), ("box", {"box": tight_box(mask)})):
                candidates, confidence, _ = predictor.predict(**values, multimask_output=True)
                predicted[prompt].append(candidates[confidence.argmax()].astype(bool))
        for prompt, metric in scores.items():
            metric.update(still.name, np.stack(predicted[prompt]), np.stack(masks))
    seconds = time.perf_counter() - started
    results = {prompt: metric.compute() for prompt, metric in scores.items()}
    if not results["point"]["instances"]:
        raise UserError("no still shows an instance to segment")
    block: dict[str, Any] = {"protocol": "stills"}
    for prompt, result in results.items():
        block[f"{prompt}_mIoU"] = result["IoU"]
        block[f"{prompt}_mIoU_images"] = result["IoU_images"]
    block |= {key: results["point"][key] for key in ("instances", "images")}
    return block | {"seconds_per_frame": seconds / len(stills)}
