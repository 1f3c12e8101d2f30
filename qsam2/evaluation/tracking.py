"""Semi-supervised tracking for scores: first masks in, masks of all frames out, through the video predictor."""

from __future__ import annotations

import numpy as np
import torch

from qsam2.data.transforms import FrameSequence
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.models.replaced import hide_progress_bar, replaced


def first_masks(video: Video, length: int, *, later_objects: bool) -> dict[int, dict[int, np.ndarray]]:
    """The prompts of semi-supervised tracking: {frame: {object id: bool (H, W)}}, each object where it first appears.

    Args:
        length: look at this many frames.
        later_objects: prompt objects that appear after the first annotated frame too.

    Raises:
        UserError: no object is ever seen.
    """
    prompts: dict[int, dict[int, np.ndarray]] = {}
    seen: set[int] = set()
    for index in range(length):
        masks = video.masks(index)
        if masks is None:
            continue
        new = {object_id: mask for object_id, mask in masks.items() if object_id not in seen and mask.any()}
        if new:
            prompts[index] = new
            seen |= new.keys()
        if seen and not later_objects:
            break
    if not prompts:
        raise UserError(f"video {video.name}: no mask to start from in its first {length} frames")
    return prompts


def track(
    model: SAM2, video: Video, prompts: dict[int, dict[int, np.ndarray]], *, length: int, non_overlapping: bool
) -> dict[int, np.ndarray]:
    """Masks of all prompted objects over the first `length` frames: {object id: bool (length, H, W)}.

    As Meta's `vos_inference.py` without post-processing: logits above 0, no hole filling. Frames before an object's
    prompt are empty. Objects that share a prompt frame are tracked in one pass; memory attention sees each object on
    its own in any case.

    Args:
        prompts: see `first_masks`.
        non_overlapping: a pixel belongs to the object with the highest logit only.
    """
    frames = FrameSequence(video, model.image_size, length)
    tracked: dict[int, np.ndarray] = {}
    # Meta's evaluation leaves the memory of prompted frames as it is; sam2 binarizes it for interactive use
    settings = {"non_overlap_masks": non_overlapping, "binarize_mask_from_pts_for_mem_enc": False}
    with replaced(model, **settings), hide_progress_bar():
        for start, masks in prompts.items():
            state = model.init_state(frames, video_size=video.size)
            for object_id, mask in masks.items():
                model.add_new_mask(state, start, object_id, torch.from_numpy(mask))
                tracked[object_id] = np.zeros((length, *video.size), dtype=bool)
            for index, object_ids, logits in model.propagate_in_video(state, start_frame_idx=start):
                for object_id, object_logits in zip(object_ids, logits[:, 0], strict=True):
                    tracked[object_id][index] = (object_logits > 0).cpu().numpy()
    return tracked


def true_masks(video: Video, object_id: int, length: int) -> tuple[list[int], np.ndarray]:
    """(indices of the annotated frames, the object's true masks on them: bool (frames, H, W))."""
    annotated = [(index, masks) for index in range(length) if (masks := video.masks(index)) is not None]
    empty = np.zeros(video.size, dtype=bool)
    return [index for index, _ in annotated], np.stack([masks.get(object_id, empty) for _, masks in annotated])
