"""Training of SAM2 on clips, for pretraining and QAT alike: prompts, the Lightning module and its stage.

A step computes Meta's segmentation loss and, for QAT, the distance to the float model (the teacher), which gets the
same clips and clicks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
import training.model.sam2
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sam2.modeling.sam.transformer import Attention
from sam2.modeling.sam2_utils import DropPath
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.data.clips import ClipDataset
from qsam2.data.datamodule import ClipDataModule
from qsam2.errors import UserError
from qsam2.layers.convert import latent_weights, quantizers, stage_bits
from qsam2.layers.products import NotFiniteError, track_noise, watch_products
from qsam2.models import SAM2
from qsam2.models.replaced import replaced
from qsam2.output import listed
from qsam2.quantizers.kernels import choose_kernels
from qsam2.recipe import Recipe
from qsam2.recipe.train import PromptRecipe, TrainRecipe
from qsam2.run import Run
from qsam2.train.losses import ImageNetDistillation, distillation, relative_error, segmentation_loss
from qsam2.train.optimizer import ENCODER, cosine_share, frozen, parameter_groups, rates
from qsam2.train.trainer import build_trainer, stage_checkpoint, training_options

log = logging.getLogger("qsam2")

SEEDS_APART = 7919
"""Difference between the seeds of successive stages."""
PLAIN_ATTENTION_PX = 384
"""Largest image side on a CPU for which training materializes attention scores."""

Click = tuple[Tensor, Tensor]
"""One click per object: coordinates (objects, 1, 2) and labels (objects, 1)."""


def attention_backend(device: torch.device, image_size: int) -> contextlib.AbstractContextManager[None]:
    """The fastest attention for training: torch's own choice, but plain matrix products for small images on a CPU.

    On a CPU the backward pass of torch's fused attention is slow (nano at 256 px in bf16 on one core: 2.6 s per
    training step with it, 2.3 s without). Scores of large images do not fit into memory.
    """
    small = device.type == "cpu" and image_size <= PLAIN_ATTENTION_PX
    return sdpa_kernel([SDPBackend.MATH]) if small else contextlib.nullcontext()


def set_prompts(model: SAM2, prompts: PromptRecipe) -> None:
    """Set the probabilities with which `SAM2Train` draws prompts."""
    points = prompts.point + prompts.box
    model.prob_to_use_pt_input_for_train = points
    model.prob_to_use_box_input_for_train = prompts.box / points if points else 0.0
    model.num_init_cond_frames_for_train = prompts.conditioning_frames
    model.rand_init_cond_frames_for_train = True
    model.num_frames_to_correct_for_train = prompts.correction_frames
    model.rand_frames_to_correct_for_train = True
    model.num_correction_pt_per_frame = prompts.correction_clicks
    model.prob_to_sample_from_gt_for_train = prompts.clicks_from_ground_truth
    model.add_all_frames_to_correct_as_cond = True


def set_dropout(model: nn.Module, share: float) -> None:
    """Set the dropout of all layers and attentions."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif isinstance(module, Attention):
            module.dropout_p = share


def without_noise(teacher: SAM2) -> SAM2:
    """Remove dropout and stochastic depth from a float model in place, so that it is one and the same target."""
    set_dropout(teacher, 0.0)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


@contextlib.contextmanager
def record_clicks(replay: Sequence[Click] | None = None) -> Iterator[list[Click]]:
    """Context manager that collects the clicks that `SAM2Train` draws, or makes it use those of `replay` in order.

    Correction clicks depend on the model's errors; replaying gives a teacher the same prompts as its student.
    """
    draw = training.model.sam2.get_next_point
    clicks: list[Click] = []

    def get_next_point(**kwargs: Any) -> Click:
        clicks.append(draw(**kwargs) if replay is None else replay[len(clicks)])
        return clicks[-1]

    with replaced(training.model.sam2, get_next_point=get_next_point):
        yield clicks


@torch.no_grad()
def prompted_forward(model: SAM2, batch: BatchedVideoDatapoint, *, points: bool) -> list[dict[str, Any]]:
    """Track a batch of clips in eval mode from mask prompts or (`points`) a click and one correction, always the same.

    Returns the outputs of each frame, as `SAM2Train.forward` does.
    """
    model.prob_to_use_pt_input_for_eval = float(points)
    model.num_correction_pt_per_frame = 1
    model.forward_backbone_per_frame_for_eval = True  # whole clips do not fit into memory at 1024 px
    return model(batch)


class VideoTraining(L.LightningModule):
    """Trains a SAM2, converted or not.

    Args:
        model: the network, converted or not.
        seed, max_steps: seed and length of the run; (seed, step) determines all randomness of a step, so that a resumed
            run repeats it.
        teacher: float model to distil from, needed if one of the recipe's distillation weights is above zero.
        quantizer_parameters: names in `model` of the learned step sizes and clips.
        steps_before: those of the stages of training before this one.
    """

    part: ClassVar[str] = ""
    """Beginning of the names of the parameters that are trained."""

    def __init__(
        self,
        model: SAM2,
        recipe: TrainRecipe,
        *,
        seed: int = 0,
        max_steps: int = 1,
        teacher: SAM2 | None = None,
        quantizer_parameters: Collection[str] = (),
        steps_before: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.steps_before = steps_before
        self.recipe = recipe
        self.seed = seed
        self.max_steps = max_steps
        self.quantizer_parameters = quantizer_parameters
        self._teacher = [teacher] if teacher is not None else []  # in a list: excluded from the state dict
        self.loss = segmentation_loss(recipe.losses)
        if not recipe.image_encoder_lr:
            model.image_encoder.requires_grad_(False)
        if recipe.distill.imagenet:
            self.imagenet = ImageNetDistillation(model)
        set_prompts(model, recipe.prompts)
        set_dropout(model, recipe.dropout)
        for network in self._teacher:
            set_prompts(without_noise(network), recipe.prompts)

    def on_fit_start(self) -> None:
        self.train()  # models come in eval mode, which Lightning keeps
        for teacher in self._teacher:
            teacher.to(self.device).train().requires_grad_(False)
        is_slow = self.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # natively, by oneDNN
        if is_slow and str(self.trainer.precision).startswith("bf16"):
            log.warning(
                "this processor multiplies no bfloat16 numbers: trainer.precision=32-true is several times faster here"
            )

    def training_step(self, batch: BatchedVideoDatapoint, batch_index: int) -> Tensor:
        self._seed_step(batch_index)
        with attention_backend(self.device, self.model.image_size):
            return self._loss(batch)

    def _loss(self, batch: BatchedVideoDatapoint) -> Tensor:
        backbone = self.model.forward_image(batch.flat_img_batch)
        embeddings = backbone["backbone_fpn"]
        backbone = self.model.prepare_prompt_inputs(backbone, batch)
        with record_clicks() as clicks:
            frames = self.model.track_frames(backbone, batch)
        losses = self.loss(frames, batch.masks)
        total = losses.pop("core_loss")
        distill = self.recipe.distill
        if distill.imagenet:
            losses["distill_imagenet"] = self.imagenet(batch.flat_img_batch, embeddings)
            total = total + distill.imagenet * losses["distill_imagenet"]
        for teacher in self._teacher:
            teacher_frames: list[dict[str, Any]] = []
            with torch.no_grad(), record_clicks(clicks):
                features = teacher.forward_image(batch.flat_img_batch)
                if distill.needs_tracking:
                    teacher.rng = self.model.rng
                    teacher_frames = teacher.track_frames({**backbone, **features}, batch)
            for name, loss in distillation(
                distill, frames, teacher_frames, embeddings, features["backbone_fpn"]
            ).items():
                losses[f"distill_{name}"] = loss
                total = total + getattr(distill, name) * loss
        if not torch.isfinite(total):
            raise diverged(f"the loss is {float(total)} at step {self.global_step}", self.recipe)
        if not total.requires_grad:  # each frame was prompted by its mask: there is nothing to learn from this batch
            total = total + 0.0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
        self.log("loss", total, prog_bar=True)
        self.log_dict({f"loss/{name.removeprefix('loss_')}": value for name, value in losses.items()})
        return total

    def _seed_step(self, step: int) -> None:
        # sam2 draws the kind of prompt from `rng`, equal on all ranks, and points from torch's generator
        self.model.rng = np.random.default_rng((self.seed, step))
        torch.manual_seed(int(np.random.SeedSequence((self.seed, step, self.global_rank)).generate_state(1)[0]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        recipe = self.recipe
        groups = parameter_groups(self.model, recipe, self.quantizer_parameters)
        if recipe.distill.imagenet:
            heads = list(self.imagenet.parameters())
            groups.append({"params": heads, "lr": recipe.lr, "weight_decay": 0.0, "role": "imagenet heads"})
        optimizer = torch.optim.AdamW(groups)  # not fused: Lightning cannot clip its gradients in mixed precision
        share = partial(cosine_share, max_steps=self.max_steps, end=recipe.lr_end, warmup_steps=recipe.warmup_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # norms before clipping, by role: shared clipping could starve one of them
        if self.global_step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients: dict[str, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            gradients[group["role"]] += [p.grad.float() for p in group["params"] if p.grad is not None]
        norms = {role: torch.nn.utils.get_total_norm(parts) for role, parts in gradients.items() if parts}
        self.log_dict({f"gradient_norm/{role}": norm for role, norm in norms.items()})
        self.log_dict({f"lr/{part}": rate for part, rate in rates(optimizer.param_groups).items()})


class StillTraining(VideoTraining):
    """Trains the image encoder of a quantized SAM2 on single frames, towards the teacher's image embeddings.

    No video backward is needed, so that a step costs a fraction of one on clips (ours).
    """

    part = ENCODER

    def _loss(self, batch: BatchedVideoDatapoint) -> Tensor:
        embeddings = self.model.forward_image(batch.flat_img_batch)["backbone_fpn"]
        with torch.no_grad():
            target = self._teacher[0].forward_image(batch.flat_img_batch)["backbone_fpn"]
        loss = relative_error(embeddings, target)
        if not torch.isfinite(loss):
            raise diverged(f"the loss is {float(loss)} at step {self.global_step}", self.recipe)
        self.log("loss/embeddings_of_stills", loss, prog_bar=True)
        return loss


def check_finite(model: SAM2, recipe: TrainRecipe) -> None:
    """Raises UserError if training has diverged: the loss of the last step does not show what that step did.

    The model is left in eval mode.
    """
    state = model.state_dict().items()
    broken = [name for name, tensor in state if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise diverged(f"{listed(broken)} became NaN or infinite", recipe)
    model.eval()
    try:
        with watch_products(model, lambda *_: None):
            track_noise(model)
    except NotFiniteError as error:
        raise diverged(str(error), recipe) from error


def diverged(what: str, recipe: TrainRecipe) -> UserError:
    """The error of a training that has diverged."""
    rates = f"train.lr={recipe.lr:g}, train.image_encoder_lr={recipe.image_encoder_lr:g}"
    return UserError(f"training has diverged, {what}: lower {rates} or train.quantizer_lr={recipe.quantizer_lr:g}")


def train(run: Run, callbacks: Sequence[Callback] = ()) -> None:
    """Stage: train on the train sources, from the last checkpoint if there is one; see `train.stages`."""
    stages, model = run.recipe.training, run.model
    if not stages:
        return
    files = [run.folder.checkpoints / stage_checkpoint(index) for index in range(len(stages))]
    reached = max((index for index, file in enumerate(files) if file.is_file()), default=0)
    with run.folder.stage("train", ", then ".join(_title(stage) for stage in stages)):
        if run.teacher is not None:
            precisions = {stage.trainer.precision for stage in stages}
            precision = next(iter(precisions)) if len(precisions) == 1 else "mixed"
            steps = sum(stage.trainer.max_steps for stage in stages)
            choose_kernels(run.recipe.trainer.compile, steps, run.device, precision)
        for index in range(reached, len(stages)):
            if index:
                log.info("stage %d of %d: %s", index + 1, len(stages), _title(stages[index]))
            with _bits_of(run, stages[index]):
                _fit(run, index, files[index], callbacks)
            for file in files[:index]:
                file.unlink(missing_ok=True)
    run.latent = latent_weights(model)


def _title(recipe: Recipe) -> str:
    assert recipe.train is not None
    stage = recipe.train.stages[0]
    parts = {key: getattr(stage, key) for key in ("weights", "activations") if getattr(stage, key) is not None}
    changes = [f"{key} in {'float' if bits == 'float' else f'{bits} bits'}" for key, bits in parts.items()]
    return ", ".join([f"{recipe.trainer.max_steps} steps on {stage.kind}", *changes])


def _bits_of(run: Run, recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """The bits of one stage of training, while it lasts."""
    assert recipe.train is not None
    stage = recipe.train.stages[0]
    if stage.own_bits or recipe.quantize is None:
        return contextlib.nullcontext()
    return stage_bits(run.model, recipe.quantize, weights=stage.weights, activations=stage.activations)


def _fit(run: Run, index: int, checkpoint: Path, callbacks: Sequence[Callback]) -> None:
    """Carry out one stage of training, or the rest of it, and store its result."""
    learned = dict(quantizers(run.model))
    recipe, ends = run.recipe.training[index], index + 1 == len(run.recipe.training)
    assert recipe.train is not None
    data, max_steps, seed = recipe.data, recipe.trainer.max_steps, recipe.seed + SEEDS_APART * index
    kind = StillTraining if recipe.train.stages[0].kind == "stills" else VideoTraining
    module = kind(
        run.model,
        recipe.train,
        seed=seed,
        max_steps=max_steps,
        teacher=run.teacher if recipe.train.distill.needs_teacher or kind is StillTraining else None,
        quantizer_parameters=[f"{name}.{key}" for name, q in learned.items() for key, _ in q.named_parameters()],
        steps_before=sum(stage.trainer.max_steps for stage in run.recipe.training[:index]),
    )
    options = training_options(recipe, learned, checkpoint=checkpoint.name, ends=ends)
    options["callbacks"] += callbacks
    trainer = build_trainer(recipe.trainer, folder=run.folder.path, loggers=run.loggers, **options)
    # curves go on where the stage before ended; a checkpoint brings its own count
    trainer.fit_loop.epoch_loop._batches_that_stepped = module.steps_before
    sources = zip(run.recipe.data.train, run.sources, strict=True)
    clips = ClipDataset(
        [source for name, source in sources if name in data.train],
        num_frames=data.num_frames,
        max_objects=data.max_objects,
        image_size=run.model.image_size,
        length=max_steps * recipe.trainer.accumulate * data.batch_size * trainer.world_size,
        augment=data.augment is not False,
        seed=seed,
        max_stride=data.max_stride,
        reverse=data.reverse,
    )
    stream = ClipDataModule(clips, batch_size=data.batch_size, num_workers=data.num_workers)
    with frozen(value for name, value in run.model.named_parameters() if not name.startswith(kind.part)):
        trainer.fit(module, stream, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    check_finite(run.model, recipe.train)
    trainer.save_checkpoint(checkpoint)  # a run killed later need not train again
