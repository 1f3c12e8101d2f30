"""Activation steps fitted to video at three time scales at once (hierarchy-based video quantization, Q-MiniSAM2).

minimise sum over scales of weight * loss(scale), see `scale_loss`. The paper's abstract gives the idea; the scales,
their losses and the choice of steps as parameters are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qsam2.data.calibration_data import Sample
from qsam2.data.clips import collate_clips
from qsam2.errors import UserError
from qsam2.layers.hooks import hooked
from qsam2.models import SAM2
from qsam2.recipe.calibrate import HierarchyRecipe
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.reconstruction.blocks import Scale
from qsam2.reconstruction.rounding import harden, learn_steps, learned_steps
from qsam2.train.losses import embedding_distillation, mask_distillation
from qsam2.train.optimizer import QUANTIZER_EPS, cosine_share
from qsam2.train.trainer import build_trainer
from qsam2.train.video_training import attention_backend

JUDGED = 4
"""Steps whose mean loss judges a fit: the first clips of each scale."""


class Tracked(NamedTuple):
    """Outputs of SAM2 for a clip, one tensor (objects, C, ...) per frame in each list."""

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
    outputs = model.forward_tracking(prompted, batch, return_dict=True)
    frames = {**outputs["cond_frame_outputs"], **outputs["non_cond_frame_outputs"]}
    return [frames[index] for index in sorted(frames)]


def tracked(model: SAM2, sample: Sample, *, points: bool) -> Tracked:
    """Outputs that the losses of the scales "short" and "long" compare, with gradients."""
    conditioned: list[Tensor] = []
    last = {"norm": model.memory_attention.norm}  # the one module that every way of reading memory calls
    with hooked(last, lambda _, __, ___, output: conditioned.append(output)):
        features = model.forward_image(sample.clip.images.to(model.device))
        frames = track_clip(model, sample, features, points=points)
    return Tracked(
        memories=[frame["maskmem_features"] for frame in frames],
        conditioned=[output.transpose(1, 2)[..., None] for output in conditioned],  # (objects, C, HW, 1)
        masks=[frame["pred_masks"] for frame in frames],
        pointers=[frame["obj_ptr"][..., None, None] for frame in frames],
        scores=[frame["multistep_object_score_logits"][-1][..., None, None] for frame in frames],
    )


def scale_loss(scale: Scale, model: SAM2, teacher: SAM2, sample: Sample, step: int) -> Tensor:
    """Difference between quantized and float model on a sample, mean over its frames; a scalar.

    frame: squared error of the image embeddings over their variance; short: that of memory features and of features
    after memory attention; long: that of object pointers, plus the Kullback-Leibler divergence of masks and object
    scores.
    Prompts alternate between masks and clicks.
    """
    if scale == "frame":
        image = sample.clip.images[step % len(sample.clip.images)][None].to(model.device)
        with torch.no_grad():
            target = teacher.forward_image(image)["backbone_fpn"]
        return embedding_distillation(model.forward_image(image)["backbone_fpn"], target) / len(target)
    points = step % 2 == 1
    with torch.no_grad():
        targets = tracked(teacher, sample, points=points)
    outputs = tracked(model, sample, points=points)
    if scale == "short":
        return _distance(outputs.memories, targets.memories) + _distance(outputs.conditioned, targets.conditioned)
    divergences = [_divergence(outputs.masks, targets.masks), _divergence(outputs.scores, targets.scores)]
    return _distance(outputs.pointers, targets.pointers) + torch.stack(divergences).sum()


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return embedding_distillation(list(outputs), list(targets)) / len(outputs)


def _divergence(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    student, teacher = ([{"pred_masks": logits} for logits in side] for side in (outputs, targets))
    return mask_distillation(student, teacher) / len(outputs)


class VideoReconstruction(L.LightningModule):
    """Fits the learned steps of a hard-rounded model to the weighted sum of the losses of all scales.

    Args:
        samples: for the scales whose weight is above zero.
        stopped: returns True once Ctrl-C was pressed.
    """

    def __init__(
        self,
        model: SAM2,
        teacher: SAM2,
        recipe: HierarchyRecipe,
        samples: Mapping[Scale, Sequence[Sample]],
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.model = model
        self._teacher = [teacher]  # in a list, so that it is not part of the module's state
        self.recipe = recipe
        self.samples = samples
        self.stopped = stopped

    def loss(self, step: int) -> Tensor:
        """Weighted sum over the scales, each with its samples in turn."""
        with attention_backend(self.device, self.model.image_size):
            losses = [
                getattr(self.recipe, scale)
                * scale_loss(scale, self.model, self._teacher[0], samples[step % len(samples)], step)
                for scale, samples in self.samples.items()
            ]
        return torch.stack(losses).sum()

    def training_step(self, step: int, batch_index: int) -> Tensor:
        if self.stopped():
            self.trainer.should_stop = True
        loss = self.loss(step)
        if not torch.isfinite(loss):
            raise UserError(f"reconstruct.video: the loss is {float(loss)} at step {step}; lower its step_lr")
        return loss

    def configure_optimizers(self) -> Any:
        steps = [step.log_scale for step in learned_steps(self.model)]
        optimizer = torch.optim.Adam(steps, lr=self.recipe.step_lr, eps=QUANTIZER_EPS)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_share(step, max_steps=self.recipe.iterations, end=0.0)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def judge(self) -> float:
        """Mean loss over the first clips, from masks and from clicks."""
        return float(torch.stack([self.loss(step) for step in range(JUDGED)]).mean())


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

    Returns the loss before and after, see `judge`; steps that are no better are dropped. None, with the model
    unchanged, if `stopped()` became True meanwhile.
    """
    options: dict[str, Any] = {"max_steps": recipe.iterations, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = build_trainer(trainer_recipe, folder=folder, **options)
    device = trainer.strategy.root_device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.requires_grad_(False)
    learn_steps(model)
    module = VideoReconstruction(model, teacher, recipe, samples, stopped)
    first = module.judge()
    try:
        trainer.fit(module, DataLoader(range(recipe.iterations), batch_size=None))  # type: ignore[arg-type]
    finally:
        model.to(device)  # Lightning leaves it on the CPU
    last = module.judge()
    harden(model)
    for parameter in trainable:
        parameter.requires_grad_(True)
    if stopped() or not last < first:
        model.load_state_dict(before)
    return None if stopped() else (first, min(first, last))
