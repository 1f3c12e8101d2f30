"""Masks of prompted objects from `sam2`'s predictors, for an image or frame by frame for a video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import cv2
import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor

from qsam2.data.transforms import FrameSequence
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.predict.parse import Prompt, Prompts

MASK_LOGIT = 10.0
"""Logit of a pixel of a mask prompt, as in sam2's video predictor."""


def segment_picture(predictor: SAM2ImagePredictor, picture: Video, prompts: Prompts) -> np.ndarray:
    """Object ids, uint8 (H, W), of a picture; a pixel belongs to the object with the highest logit above 0.

    A single click gives the best of three masks by predicted IoU. A mask prompt is refined.
    """
    predictor.set_image(picture.frame(0))
    logits = {}
    for object_id, frames in prompts.items():
        prompt = frames[0]
        masks, confidence, _ = predictor.predict(
            point_coords=np.array(prompt.points) if prompt.points else None,
            point_labels=np.array(prompt.labels) if prompt.points else None,
            box=np.array(prompt.box) if prompt.box else None,
            mask_input=None if prompt.mask is None else _low_logits(prompt.mask, predictor.model.image_size // 4),
            multimask_output=prompt.labels == [1] and prompt.box is None and prompt.mask is None,
            return_logits=True,
        )
        logits[object_id] = torch.from_numpy(masks[confidence.argmax()])
    return _ids(logits)


def track_objects(model: SAM2, video: Video, prompts: Prompts) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, object ids uint8 (H, W)) of a video, from the prompts to its end and back to its start.

    Each object is tracked both ways from its first prompt. Objects whose first prompts share a frame are tracked
    together, and a pixel belongs to the one with the highest logit above 0. Groups are tracked one after another: a
    frame is yielded once per group.

    Raises:
        UserError: an object has a mask and another prompt on one frame.
    """
    for object_id, frames in prompts.items():
        for frame, prompt in frames.items():
            if prompt.mask is not None and (prompt.points or prompt.box):
                raise UserError(
                    f"object {object_id} has a mask and points or a box on frame {frame}: in a video give one of them"
                )
    frames_of_model = FrameSequence(video, model.image_size, len(video))
    for start in sorted({min(frames) for frames in prompts.values()}):
        state = model.init_state(frames_of_model, video_size=video.size)
        for object_id, frames in prompts.items():
            if min(frames) == start:
                for frame, prompt in sorted(frames.items()):
                    _add(model, state, object_id, frame, prompt)
        for reverse in (False, True) if start > 0 else (False,):
            for index, object_ids, logits in model.propagate_in_video(state, start_frame_idx=start, reverse=reverse):
                yield index, _ids(dict(zip(object_ids, logits[:, 0], strict=True)))


def _add(model: SAM2, state: dict, object_id: int, frame: int, prompt: Prompt) -> None:
    if prompt.mask is not None:
        model.add_new_mask(state, frame, object_id, prompt.mask)
        return
    points = {"points": prompt.points, "labels": prompt.labels} if prompt.points else {}
    model.add_new_points_or_box(state, frame, object_id, box=prompt.box, **points)


def _ids(logits: Mapping[int, Tensor]) -> np.ndarray:
    """{object id: logits (H, W)} to the id of the highest logit above 0, uint8 (H, W); 0 for none."""
    highest, index = torch.stack(list(logits.values())).max(dim=0)
    of_index = torch.tensor(list(logits), dtype=torch.uint8, device=index.device)
    return torch.where(highest > 0, of_index[index], 0).cpu().numpy()


def _low_logits(mask: np.ndarray, side: int) -> np.ndarray:
    """bool (H, W) to (1, side, side), between -MASK_LOGIT and MASK_LOGIT."""
    low = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    return (2 * low[None] - 1) * MASK_LOGIT
