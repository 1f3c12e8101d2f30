"""A float model's own masks of footage that has none: clicks on a grid, the surest masks, tracked (ours).

After the automatic masks of SAM (Kirillov et al., ICCV 2023, section 4), which filter by predicted IoU and stability
at fixed thresholds; here both are relative to the surest mask of the picture, as small models predict a low IoU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsam2.data.clips import Source
from qsam2.data.transforms import to_model_input
from qsam2.data.unlabelled import GRID, OWN_MASKS, Unlabelled, has_masks
from qsam2.data.video import Masks, Video
from qsam2.errors import UserError
from qsam2.evaluation.tracking import track
from qsam2.models import SAM2
from qsam2.output import listed
from qsam2.run import Run

log = logging.getLogger("qsam2")

AREAS = (0.002, 0.75)
"""Smallest and largest share of the picture that an object covers."""
LEAST_SURE = 0.5
"""Masks are kept that are at least this sure, relative to the surest of the picture."""
MAX_OVERLAP = 0.5
"""Share of the smaller of two masks above which they are taken for one object."""
STABILITY_LOGIT = 1.0
"""Stability: IoU of a mask thresholded at plus and at minus this logit."""


class OwnMasks:
    """A float model as a `Labeller`: masks of up to `max_objects` disjoint objects, the surest first.

    Each clip is labelled once: its masks are kept, a bit per pixel, for the passes of calibration.
    """

    def __init__(self, model: SAM2, max_objects: int) -> None:
        self.model, self.max_objects = model, max_objects
        self._packed: dict[tuple[str, ...], list[dict[int, np.ndarray]]] = {}

    def first(self, video: Video) -> Masks:
        return self._labelled(video, 1)[0]

    def tracked(self, video: Video) -> list[Masks]:
        return self._labelled(video, len(video))

    def _labelled(self, video: Video, length: int) -> list[Masks]:
        """Masks of the first `length` frames."""
        key = (video.name, *video.frame_names[:length])
        if key not in self._packed:
            first = own_masks(self.model, video.frame(0), self.max_objects)
            tracked: dict[int, np.ndarray] = {}
            if first and length > 1:
                tracked = track(self.model, video, {0: first}, length=length, non_overlapping=True)
            rest = [{item: frames[index] for item, frames in tracked.items()} for index in range(1, length)]
            self._packed[key] = [{item: np.packbits(mask) for item, mask in masks.items()} for masks in (first, *rest)]
        pixels = video.size[0] * video.size[1]
        return [
            {item: np.unpackbits(bits, count=pixels).reshape(video.size).astype(bool) for item, bits in masks.items()}
            for masks in self._packed[key]
        ]


@torch.no_grad()
def own_masks(model: SAM2, frame: np.ndarray, max_objects: int) -> Masks:
    """Objects that a model finds in a frame, RGB uint8 (H, W, 3): {1, 2, ...: bool (H, W)}, disjoint, surest first.

    How sure a mask is: its predicted IoU times its stability. Empty if no mask has an area within `AREAS`.
    """
    logits, sureness = _candidates(model, frame)  # (clicks * 3, S/4, S/4), (clicks * 3,)
    masks = logits > 0
    share = masks.float().mean((1, 2))
    fits = (share >= AREAS[0]) & (share <= AREAS[1])
    order = sorted(torch.nonzero(fits).flatten().tolist(), key=lambda index: (-float(sureness[index]), index))
    kept: list[int] = []
    for index in order:
        if len(kept) == max_objects or sureness[index] < LEAST_SURE * sureness[order[0]]:
            break
        if all(_overlap(masks[index], masks[other]) <= MAX_OVERLAP for other in kept):
            kept.append(index)
    free = np.ones(frame.shape[:2], dtype=bool)
    objects: Masks = {}
    for index in kept:
        whole = F.interpolate(logits[index][None, None], frame.shape[:2], mode="bilinear", align_corners=False)[0, 0]
        mask = (whole > 0).cpu().numpy() & free
        free &= ~mask
        if mask.any():
            objects[len(objects) + 1] = mask
    return objects


def _candidates(model: SAM2, frame: np.ndarray) -> tuple[Tensor, Tensor]:
    """Three masks for each click of the grid, as logits (clicks * 3, S/4, S/4), and how sure each is."""
    image = to_model_input(frame, model.image_size)[None].to(model.device)
    features = model.forward_image(image)["backbone_fpn"]
    embedding = features[-1] + model.no_mem_embed.view(1, -1, 1, 1)
    centres = (torch.arange(GRID, device=model.device) + 0.5) * model.image_size / GRID
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    clicks = torch.stack([x, y], dim=-1).view(-1, 1, 2)
    ones = torch.ones(len(clicks), 1, dtype=torch.int, device=model.device)
    sparse, dense = model.sam_prompt_encoder((clicks, ones), boxes=None, masks=None)
    logits, ious, _, _ = model.sam_mask_decoder(
        image_embeddings=embedding,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=True,
        high_res_features=list(features[:-1]),
    )
    inner, outer = ((logits > level).sum((2, 3)) for level in (STABILITY_LOGIT, -STABILITY_LOGIT))
    return logits.float().flatten(0, 1), (ious.float() * inner / outer.clamp(min=1)).flatten()


def _overlap(mask: Tensor, other: Tensor) -> float:
    return float((mask & other).sum() / torch.minimum(mask.sum(), other.sum()).clamp(min=1))


def label_videos(videos: Sequence[Video], model: SAM2, max_objects: int) -> list[Video]:
    """The videos, those without masks prompted by a float model; without those in which it finds no object.

    Raises:
        UserError: it finds no object in any of them.
    """
    if has_masks(videos):
        return list(videos)
    label_sources([Source(videos)], model, max_objects)
    kept = [video for video in videos if video.masks(0)]
    if not kept:
        raise UserError(
            f"the float model finds no object in {videos[0].name} and {len(videos) - 1} more: give pictures that show "
            "objects, a checkpoint that is trained, or data with masks"
        )
    objects = sum(len(video.masks(0) or {}) for video in kept)
    log.info("prompts: %s: %d objects in %d of %d", OWN_MASKS, objects, len(kept), len(videos))
    if empty := [video.name for video in videos if video not in kept]:
        log.warning("not scored: no object was found in %s", listed(empty))
    return kept


def label_sources(sources: Sequence[Source], model: SAM2, max_objects: int) -> None:
    """Have a float model make the masks of sources without masks, when they are drawn from."""
    for source in sources:
        labeller = OwnMasks(model, max_objects)
        for video in source.videos:
            if isinstance(video, Unlabelled):
                video.labeller = labeller


def label_footage(run: Run) -> None:
    """Stage: prompt what comes without masks by the float model's own."""
    if has_masks([*run.videos, *(video for source in run.sources for video in source.videos)]):
        return
    data, model = run.recipe.data, run.teacher
    if model is None:
        raise UserError(
            f"data.val={data.scored} has no masks and serves to compare a quantized model with the float one: give "
            "quantize, or data with masks"
        )
    run.prepare_inference()
    label_sources(run.sources, model, data.max_objects)
    with run.folder.stage("prompt", f"{len(run.videos)} videos without masks"):
        run.videos = label_videos(run.videos, model, data.max_objects)
