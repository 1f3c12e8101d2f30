"""Recipe sections of training: stages, optimization, prompts, losses and distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from qsam2.recipe.quantize import Bits
from qsam2.recipe.section import LearningRate, LearningRateOrNone, Names, Section

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
RATES = ("lr", "image_encoder_lr", "quantizer_lr")
"""Keys of `train` that are learning rates."""


class PromptRecipe(Section):
    """Prompts of training clips. Defaults: Meta's fine-tuning. Clips without a point or box get a mask prompt."""

    point: Share = 0.25
    """Share of clips prompted by a click."""
    box: Share = 0.25
    """Share of clips prompted by a box."""
    conditioning_frames: PositiveInt = 2
    """Most prompted frames per clip: the first, and up to this many in all, their number drawn per clip."""
    correction_frames: PositiveInt = 2
    """Most frames per clip with correction clicks, prompted frames included."""
    correction_clicks: PositiveInt = 7
    """Correction clicks on each of these frames, placed where the prediction errs. sam2 needs at least one."""
    clicks_from_ground_truth: Share = 0.1
    """Probability that correction clicks are drawn from the true mask instead."""

    @model_validator(mode="after")
    def _possible(self) -> PromptRecipe:
        if self.point + self.box > 1:
            raise ValueError(f"point={self.point} and box={self.box} are shares of the clips and sum to more than 1")
        if self.correction_frames < self.conditioning_frames:
            raise ValueError("correction_frames is below conditioning_frames, but every prompted frame is corrected")
        return self


class LossRecipe(Section):
    """Weights of Meta's losses, which are summed over frames and clicks."""

    focal: NonNegative = 20.0
    """Focal loss of the mask (alpha 0.25, gamma 2)."""
    dice: NonNegative = 1.0
    """Dice loss of the mask."""
    iou: NonNegative = 1.0
    """L1 loss of the predicted IoU, over all candidate masks."""
    object_score: NonNegative = 1.0
    """Binary cross-entropy of the score that the object is visible."""


class DistillRecipe(Section):
    """Weights of the losses towards teachers. 0: the loss is left out, and its teacher does not run."""

    mask_logits: NonNegative = 0.0
    """Kullback-Leibler divergence from the float model's foreground probabilities, per pixel, after each click."""
    image_embeddings: NonNegative = 0.0
    """Squared error against the float model's image embeddings, relative to their variance."""
    memory_features: NonNegative = 0.0
    """Squared error against what the float model's memory encoder stores of each frame, relative to its variance."""
    object_pointers: NonNegative = 0.0
    """Squared error against the float model's object pointers, relative to their variance."""
    object_scores: NonNegative = 0.0
    """Kullback-Leibler divergence from the float model's probabilities that the object is visible."""
    imagenet: NonNegative = 0.0
    """Features of EfficientNet-Lite0, for training from scratch; needs pip install 'qsam2[pretrain]'."""

    @property
    def needs_teacher(self) -> bool:
        """True if a loss compares with the float model."""
        return self.image_embeddings > 0 or self.needs_tracking

    @property
    def needs_tracking(self) -> bool:
        """True if a loss compares with the float model's tracking."""
        return max(self.mask_logits, self.memory_features, self.object_pointers, self.object_scores) > 0


class StageRecipe(Section):
    """One stage of training. A key that is null is as the sections `trainer` and `data` say."""

    kind: Literal["clips", "stills"] = "clips"
    """clips: all of the model, end to end. stills: the image encoder alone, towards the float model's image embeddings
    of single frames; a step costs a fraction of one on clips."""
    steps: PositiveInt | None = None
    """Training steps."""
    num_frames: PositiveInt | None = None
    """Frames per clip."""
    batch_size: PositiveInt | None = None
    """Clips, or stills, per step and device."""
    rate: LearningRate = 1.0
    """Factor on the learning rates of `train`."""
    sources: Names | None = None
    """Those of `data.train` that this stage draws from: one, or a list."""
    weights: Literal["float"] | Bits | None = None
    """Bits of the weights to which the recipe gives fewer, or float, while this stage lasts. Ranges are found anew at
    its start and end, so that integers from calibrate.rounding are given up."""
    activations: Literal["float"] | None = None
    """float: activations are not quantized while this stage lasts."""
    precision: Precision | None = None
    """Arithmetic of the stage."""

    @property
    def own_bits(self) -> bool:
        """True if the stage trains with the bits that the run ships."""
        return self.weights is None and self.activations is None

    @model_validator(mode="after")
    def _one_frame(self) -> StageRecipe:
        if self.kind == "stills" and self.num_frames is not None:
            raise ValueError(f"num_frames={self.num_frames} is for kind=clips, stills have one frame: leave it out")
        return self


class TrainRecipe(Section):
    """Optimization: AdamW with a cosine schedule.

    Defaults: Meta's fine-tuning (sam2.1_hiera_b+_MOSE_finetune.yaml) without dropout; for quantizers our own.
    """

    stages: Annotated[tuple[StageRecipe, ...], Field(min_length=1)] = (StageRecipe(),)
    """Stages, one after another, each with a schedule of its own; a stopped run resumes within its stage."""
    lr: LearningRate = 5e-6
    """Initial learning rate outside the image encoder."""
    image_encoder_lr: LearningRateOrNone = 3e-6
    """Initial learning rate of the image encoder. 0: it and its quantizers stay as they are, without gradients."""
    quantizer_lr: LearningRate = 1e-3
    """Initial learning rate of learned steps and clips, which are stored as logarithms."""
    lr_end: Share = 0.1
    """Final learning rates, as a share of the initial ones."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up before the cosine."""
    weight_decay: NonNegative = 0.1
    """Weight decay; none on biases, LayerNorms, learned steps and clips."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor on the learning rate per layer of the trunk, from its last layer down; 1: none."""
    dropout: Share = 0.0
    """Dropout of the memory attention and of all other attentions (Meta's fine-tuning: 0.1)."""
    drop_path: Share = 0.0
    """Stochastic depth of the trunk (Meta's fine-tuning: 0.1)."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights over the last stage, which then is the result.
    null: no average."""
    freeze_statistics_at: Share = 0.8
    """Share of the last stage's steps after which running statistics of quantizers stay fixed."""
    prompts: PromptRecipe = PromptRecipe()
    """Prompts of training clips."""
    losses: LossRecipe = LossRecipe()
    """Weights of Meta's losses."""
    distill: DistillRecipe = DistillRecipe()
    """Weights of the losses towards teachers."""
