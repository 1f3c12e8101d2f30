"""Region similarity J and boundary accuracy F of video object segmentation, computed as DAVIS-2017's evaluator does."""

from __future__ import annotations

import math

import cv2
import numpy as np

from qsam2.errors import UserError


def check_masks(pred: np.ndarray, true: np.ndarray, name: str = "masks") -> None:
    """Raise UserError, naming ``name``, unless both are bool (T, H, W) of one shape."""
    for which, masks in (("predicted", pred), ("true", true)):
        if masks.dtype != bool or masks.ndim != 3:
            raise UserError(
                f"{name}: {which} masks are {masks.dtype} of shape {masks.shape}; give bool masks of shape (T, H, W), "
                "e.g. logits > 0"
            )
    if pred.shape != true.shape:
        raise UserError(
            f"{name}: predicted masks have shape {pred.shape}, true masks {true.shape}; "
            "give both the same frames at the size of the true masks"
        )


def region_similarity(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """J of each frame: intersection over union, 1 where the union is empty (Perazzi et al. 2016).

    ``pred`` and ``true`` are bool (T, H, W). Returns float64 (T,) in 0-1. Raises UserError on another type or shape.
    """
    check_masks(pred, true)
    scores = np.ones(len(true))
    for t, (p, g) in enumerate(zip(pred, true, strict=True)):  # per frame: count_nonzero without an axis is SIMD
        union = np.count_nonzero(p | g)
        if union:
            scores[t] = np.count_nonzero(p & g) / union
    return scores


def boundary_accuracy(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """F of each frame: F-measure of the boundaries matched within 0.8 % of the diagonal (Perazzi et al. 2016).

    ``pred`` and ``true`` are bool (T, H, W). Returns float64 (T,) in 0-1. Raises UserError on another type or shape.
    """
    check_masks(pred, true)
    radius = math.ceil(0.008 * math.hypot(*true.shape[1:]))  # pixels
    disk = _disk(radius)
    return np.array([_frame_boundary_accuracy(p, g, disk) for p, g in zip(pred, true, strict=True)], dtype=np.float64)


def statistics(scores: np.ndarray) -> tuple[float, float, float]:
    """(mean, recall, decay) of one object's scores (T,), T >= 1, as DAVIS-2017 defines them, in the scores' unit.

    Recall is the share of frames above 0.5, decay the mean of the first quarter minus that of the last. Deviates from
    the reference beyond 256 frames, where its 8-bit bounds of the quarters overflow.
    """
    bounds = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
    first, last = scores[bounds[0] : bounds[1] + 1], scores[bounds[3] : bounds[4] + 1]
    return float(scores.mean()), float((scores > 0.5).mean()), float(first.mean() - last.mean())


def _disk(radius: int) -> np.ndarray:
    """Pixels within ``radius`` of the centre: uint8 (2 * radius + 1, 2 * radius + 1)."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares <= radius**2).astype(np.uint8)


def _frame_boundary_accuracy(pred: np.ndarray, true: np.ndarray, disk: np.ndarray) -> float:
    crop = _bounding_box(pred | true)
    pred_edge, true_edge = _boundary(pred[crop]), _boundary(true[crop])
    n_pred, n_true = np.count_nonzero(pred_edge), np.count_nonzero(true_edge)
    if n_pred == 0 or n_true == 0:  # (precision, recall) is (1, 0) or (0, 1), or (1, 1) if both are empty
        return float(n_pred == n_true)
    precision = np.count_nonzero(pred_edge & cv2.dilate(true_edge, disk)) / n_pred
    recall = np.count_nonzero(true_edge & cv2.dilate(pred_edge, disk)) / n_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Crop of ``mask`` (H, W) with its foreground and, inside the image, one more pixel on each side.

    The crop has the same boundary map as the image, which looks one pixel to the right and below.
    """
    slices = []
    for axis in (1, 0):
        filled = np.flatnonzero(mask.any(axis=axis))
        slices.append(slice(max(filled[0] - 1, 0), filled[-1] + 2) if len(filled) else slice(0, 1))
    return slices[0], slices[1]


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Boundary map uint8 (H, W): pixels that differ from their right, lower or lower-right neighbour.

    The last row compares with the right only, the last column with the lower only, the corner is 0.
    """
    m = mask.view(np.uint8)
    edge = np.zeros(m.shape, np.uint8)
    edge[:-1, :-1] = (m[:-1, :-1] ^ m[:-1, 1:]) | (m[:-1, :-1] ^ m[1:, :-1]) | (m[:-1, :-1] ^ m[1:, 1:])
    edge[-1, :-1] = m[-1, :-1] ^ m[-1, 1:]
    edge[:-1, -1] = m[:-1, -1] ^ m[1:, -1]
    return edge
