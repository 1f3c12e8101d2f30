"""Activation steps fitted to video at three time scales at once (hierarchy-based video quantization, Q-MiniSAM2).

minimise sum over scales of weight * loss(scale), see `scale_loss`, on frames, successive frames and whole videos, see
`time_scales`. The paper's abstract gives the idea; the scales, their losses and the choice of steps as parameters are
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qsam2.data.calibration_data import CalibrationData, Sample
from qsam2.data.clips import Source, annotated_frames, collate_clips
from qsam2.data.video import Video
from qsam2.layers.hooks import hooked
from qsam2.models import SAM2
from qsam2.recipe.calibrate import HierarchyRecipe
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.reconstruction.blocks import Scale
from qsam2.reconstruction.fit_block import Fit
from qsam2.reconstruction.rounding import harden, learn_steps
from qsam2.run import Run
from qsam2.train.losses import divergence, relative_error
from qsam2.train.video_training import attention_backend

JUDGED = 4
"""Steps whose mean loss judges a fit: the first clips of each scale."""


class SpreadVideo(Video):
    """Video of `num_frames` frames, evenly spread over the annotated frames of another."""

    def __init__(self, video: Video, num_frames: int) -> None:
        annotated = annotated_frames(video)
        positions = np.linspace(0, len(annotated) - 1, min(num_frames, len(annotated))).round().astype(int)
        self._video = video
        self._frames = [annotated[int(position)] for position in positions]
        self.name, self.size = video.name, video.size
        self.frame_names = [video.frame_names[index] for index in self._frames]

    def frame(self, index: int) -> np.ndarray:
        return self._video.frame(self._frames[index])

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        return self._video.masks(self._frames[index])


def time_scales(run: Run) -> dict[Scale, CalibrationData]:
    """Data of each scale: the run's stills and clips; clips of successive frames; clips spread over whole videos.

    All clips have `calibrate.num_frames` frames; there are at most as many spread clips as videos.
    """
    amount = run.recipe.calibrate
    spread = [
        Source([SpreadVideo(video, amount.num_frames) for video in source.videos], source.weight)
        for source in run.sources
    ]
    spread_clips = min(amount.clips, sum(len(source.videos) for source in run.sources))

    def draw(sources: Sequence[Source], clips: int) -> CalibrationData:
        only_clips = amount.model_copy(update={"clips": clips, "stills": 0})
        size = {"image_size": run.model.image_size, "max_objects": run.recipe.data.max_objects}
        return CalibrationData(sources, only_clips, **size, max_stride=1, seed=run.recipe.seed)

    return {"frame": run.calibration, "short": draw(run.sources, amount.clips), "long": draw(spread, spread_clips)}


class Tracked(NamedTuple):
    """Outputs of SAM2 for a clip, one tensor (objects, ...) per frame in each list."""

    memories: list[Tensor]
    conditioned: list[Tensor]
    """Image features after memory attention, of frames that have a memory."""
    masks: list[Tensor]
    pointers: list[Tensor]
    scores: list[Tensor]


def track_clip(model: SAM2, sample: Sample, features: dict[str, Any], *, points: bool) -> list[dict[str, Any]]:
    """Track a clip in eval mode, from its image features and masks or one click per object; SAM2's outputs per frame.

    Without corrections, which would depend on the predicted masks: quantized and float model get the same prompts.
    """
    batch = collate_clips([sample.clip]).to(model.device)
    model.prob_to_use_pt_input_for_eval = float(points)
    prompted = model.prepare_prompt_inputs({**features}, batch)
    prompted["frames_to_add_correction_pt"] = []
    return model.track_frames(prompted, batch)


def tracked(model: SAM2, sample: Sample, *, points: bool) -> Tracked:
    """Outputs that the losses of the scales "short" and "long" compare, with gradients."""
    conditioned: list[Tensor] = []
    last = {"norm": model.memory_attention.norm}  # the one module that every way of reading memory calls
    with hooked(last, lambda _, __, ___, output: conditioned.append(output)):
        features = model.forward_image(sample.clip.images.to(model.device))
        frames = track_clip(model, sample, features, points=points)
    return Tracked(
        memories=[frame["maskmem_features"] for frame in frames],
        conditioned=conditioned,
        masks=[frame["pred_masks"] for frame in frames],
        pointers=[frame["obj_ptr"] for frame in frames],
        scores=[frame["multistep_object_score_logits"][-1] for frame in frames],
    )


def scale_loss(scale: Scale, model: SAM2, teacher: SAM2, sample: Sample, step: int) -> Tensor:
    """Difference between quantized and float model on a sample, mean over its frames; a scalar.

    frame: squared error of the image embeddings over their variance; short: that of memory features and of features
    after memory attention; long: that of object pointers, plus the Kullback-Leibler divergence of masks and object
    scores. Prompts alternate between masks and clicks.
    """
    if scale == "frame":
        image = sample.clip.images[step % len(sample.clip.images)][None].to(model.device)
        with torch.no_grad():
            target = teacher.forward_image(image)["backbone_fpn"]
        return relative_error(model.forward_image(image)["backbone_fpn"], target) / len(target)
    points = step % 2 == 1
    with torch.no_grad():
        targets = tracked(teacher, sample, points=points)
    outputs = tracked(model, sample, points=points)
    if scale == "short":
        stored = relative_error(outputs.memories, targets.memories) / len(outputs.memories)
        return stored + relative_error(outputs.conditioned, targets.conditioned) / len(outputs.conditioned)
    pointers = relative_error(outputs.pointers, targets.pointers)
    divergences = divergence(outputs.masks, targets.masks) + divergence(outputs.scores, targets.scores)
    return (pointers + divergences) / len(outputs.masks)


def fit_video(
    model: SAM2,
    teacher: SAM2,
    samples: Mapping[Scale, Sequence[Sample]],
    recipe: HierarchyRecipe,
    trainer_recipe: TrainerRecipe,
    *,
    folder: Path,
    stopped: Callable[[], bool],
) -> tuple[float, float] | None:
    """Fit all activation steps of a calibrated model in place; its rounded weights stay.

    Returns the mean loss over the first clips, from masks and from clicks, before and after; steps that are no better
    are dropped. None, with the model unchanged, if `stopped()` became True meanwhile. `samples` are for the scales
    whose weight is above zero.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(step: int, _: int = 0) -> Tensor:
        """Weighted sum over the scales, each with its samples in turn."""
        with attention_backend(model.device, model.image_size):
            losses = [
                getattr(recipe, scale) * scale_loss(scale, model, teacher, clips[step % len(clips)], step)
                for scale, clips in samples.items()
            ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def judge() -> float:
        return float(torch.stack([loss(step) for step in range(JUDGED)]).mean())

    learn_steps(model)
    first = judge()
    batches: Any = DataLoader(range(recipe.iterations), batch_size=None)  # type: ignore[arg-type]
    Fit(model, loss, recipe, stopped).run(trainer_recipe, folder, batches)
    last = judge()
    harden(model)
    if stopped() or not last < first:
        model.load_state_dict(before)
    return None if stopped() else (first, min(first, last))
