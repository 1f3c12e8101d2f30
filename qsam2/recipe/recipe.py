"""Everything a user can set, with its default and its check (also: `calibrate.py`, `quantize.py`, `quantizers.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.recipe.memory import MemoryRecipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.reconstruct import ReconstructRecipe
from qsam2.recipe.section import Section

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _written(value: object) -> object:
    return str(value) if isinstance(value, (int, float)) else value  # YAML reads 2.1 as a number


class ModelRecipe(Section):
    """Which SAM2."""

    size: str = "nano"
    version: Annotated[Literal["2", "2.1"], BeforeValidator(_written)] = "2.1"
    checkpoint: str | None = "auto"
    """A path; auto: the size's official weights; null: random weights, to train from scratch."""
    image_size: int | None = None
    """Side of the square input in pixels, a multiple of 32; null: the size's own (1024, nano 320)."""


class DataRecipe(Section):
    """What to train, calibrate and validate on. A source is `KIND[:ROOT[:SPLIT]]`, see data/README.md."""

    train: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("moving_objects",)
    weights: tuple[PositiveFloat, ...] | None = None
    """How often each train source is drawn, relative; null: all the same."""
    val: str | None = None
    """What is scored; null: the first train source's val split."""
    root: Path | None = None
    """Folder of the sources that name none."""
    num_frames: PositiveInt = 8
    max_stride: PositiveInt = 1
    """Frames are drawn with a random stride up to this."""
    reverse: bool = False
    """Whether half of the clips are played backwards."""
    max_objects: PositiveInt = 3
    batch_size: PositiveInt = 1
    """Clips a step and device."""
    augment: bool | Literal["real"] = True
    """real: all but generated videos, of which no two are the same as they are."""
    num_workers: Annotated[int, Field(ge=0)] = 2

    @property
    def scored(self) -> str:
        """The source that is scored: `val`, or the first train source, whose val split it then is."""
        if self.val is not None:
            return self.val
        kind, *rest = self.train[0].split(":")
        return kind if kind == "moving_objects" else ":".join([kind, *rest[:1]])  # its root, without its split

    @model_validator(mode="after")
    def _one_weight_a_source(self) -> DataRecipe:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(f"{len(self.weights)} weights for {len(self.train)} train sources; give one each")
        return self


class PromptRecipe(Section):
    """Prompts while training; what is left to 1 is mask prompts. Defaults: Meta's fine-tuning recipe."""

    point: Share = 0.25
    box: Share = 0.25
    conditioning_frames: PositiveInt = 2
    """The first frame and up to this many in all are prompted."""
    correction_frames: PositiveInt = 2
    correction_clicks: PositiveInt = 7
    """On each such frame; sam2 needs at least one."""
    clicks_from_ground_truth: Share = 0.1

    @model_validator(mode="after")
    def _possible(self) -> PromptRecipe:
        if self.point + self.box > 1:
            raise ValueError(f"point={self.point} and box={self.box} are shares of the clips and sum to more than 1")
        if self.correction_frames < self.conditioning_frames:
            raise ValueError("correction_frames is below conditioning_frames, but every prompted frame is corrected")
        return self


class LossRecipe(Section):
    """Weights of Meta's losses, summed over frames and clicks."""

    focal: NonNegative = 20.0
    dice: NonNegative = 1.0
    iou: NonNegative = 1.0
    object_score: NonNegative = 1.0


class DistillRecipe(Section):
    """Weights of the losses towards other models; zero: that model is not run."""

    mask_logits: NonNegative = 0.0
    """Of the float model."""
    image_embeddings: NonNegative = 0.0
    """Of the float model."""
    imagenet: NonNegative = 0.0
    """Features of EfficientNet-Lite0, for training from scratch; needs the extra `pretrain`."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the float model is."""
        return self.mask_logits > 0 or self.image_embeddings > 0


class TrainRecipe(Section):
    """Optimization. Defaults: Meta's fine-tuning recipe (sam2.1_hiera_b+_MOSE_finetune.yaml); quantizers: ours."""

    lr: PositiveFloat = 5e-6
    image_encoder_lr: NonNegative = 3e-6
    """0: the image encoder stays as it is, with its quantizers, and no gradients of it are computed."""
    quantizer_lr: PositiveFloat = 1e-3
    """Learned steps and clips: logarithms, hence a rate of their own."""
    lr_end: Share = 0.1
    """The cosine ends at this share of the rates."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    dropout: Share = 0.0
    drop_path: Share = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is what is kept; null: the last weights."""
    freeze_statistics_at: Share = 0.8
    """Running statistics of the quantizers stand still from this share of the steps on."""
    prompts: PromptRecipe = PromptRecipe()
    losses: LossRecipe = LossRecipe()
    distill: DistillRecipe = DistillRecipe()


class TrainerRecipe(Section):
    """What goes to Lightning's Trainer."""

    max_steps: PositiveInt = 2000
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: PositiveInt = 1
    strategy: str = "auto"
    precision: Precision = "32-true"
    compile: Literal["auto", "on", "off"] = "auto"
    """Fake quantization through torch.compile; auto: where that is faster and the run is long enough to pay for it."""
    gradient_clip: NonNegative = 0.1
    accumulate: PositiveInt = 1
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints that a killed run resumes from."""
    log_every: PositiveInt = 10
    profiler: Literal["simple", "advanced", "pytorch"] | None = None


class EvaluateRecipe(Section):
    """How models are scored on `data.val`."""

    protocol: Literal["davis", "sav"] = "davis"
    precision: Precision = "32-true"
    """Of inference, whatever the training's; scores state it."""
    videos: PositiveInt | None = None
    """Score the first so many videos only."""
    frames: PositiveInt | None = None
    """Score the first so many frames of each video only."""
    stills: str | None = None
    """Images with instances, written as data.val, on which masks from one box each are scored, too; null: none."""
    after_calibration: bool = True
    """Whether a run that trains is scored before it, too: what calibration alone gives (PTQ)."""
    float_cache: Path | None = None
    """Folder where scores and masks of float models are kept, for other runs from the same weights; null: nowhere."""


class LogRecipe(Section):
    """Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where an API key is configured, offline otherwise."""
    project: str = "qsam2"
    group: str | None = None


class Recipe(Section):
    """One run, from checkpoint to report."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")] = "run"
    output: Path | None = None
    """Run folder; null: runs/NAME."""
    seed: Annotated[int, Field(ge=0)] = 0
    debug: Literal["fast", "overfit", "profile"] | None = None
    """Values for trying things out, see `DEBUG_PRESETS`; null in a resolved recipe, which holds those values."""
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    calibrate: CalibrateRecipe = CalibrateRecipe()
    quantize: QuantizeRecipe | None = None
    reconstruct: ReconstructRecipe | None = None
    """Rounding and activation steps fitted block by block, after all calibration; null: not at all."""
    train: TrainRecipe | None = None
    trainer: TrainerRecipe = TrainerRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    memory: MemoryRecipe = MemoryRecipe()
    log: LogRecipe = LogRecipe()

    @model_validator(mode="after")
    def _calibrates_what_it_quantizes(self) -> Recipe:
        calibrate, quantize = self.calibrate, self.quantize
        for key in ("weights", "rounding"):
            method = getattr(calibrate, key)
            if method is not None and (quantize is None or quantize.weights is None):
                raise ValueError(
                    f"calibrate.{key}={method.method} needs quantized weights: give quantize.weights, or null here"
                )
        if calibrate.smooth is not None and (quantize is None or quantize.activations is None):
            raise ValueError("calibrate.smooth needs quantized activations: give quantize.activations, or null here")
        if calibrate.rounding is not None and self.train is not None:
            raise ValueError(
                f"calibrate.rounding={calibrate.rounding.method} is for calibration alone, training moves the weights "
                "again: give train=null, or null here"
            )
        return self

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Recipe:
        if self.quantize is None and self.train is not None and self.train.distill.needs_teacher:
            raise ValueError(
                "train.distill.mask_logits and image_embeddings follow the float model, but quantize=null trains just "
                "that: set both to 0, or give quantize"
            )
        return self

    @model_validator(mode="after")
    def _reconstructs_what_it_quantizes(self) -> Recipe:
        if self.reconstruct is None:
            return self
        method, quantize = self.reconstruct.method, self.quantize
        if quantize is None or quantize.weights is None:
            raise ValueError(f"reconstruct.method={method} fits the rounding of weights: give quantize.weights")
        if method == "qdrop" and quantize.activations is None:
            raise ValueError(
                "reconstruct.method=qdrop drops the quantization of activations, but these are in float: "
                "give quantize.activations, or method=brecq"
            )
        if self.train is not None:
            raise ValueError(
                f"reconstruct.method={method} is for calibration alone, training moves the weights again: "
                "give train=null, or reconstruct=null"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run's files go."""
        return self.output or Path("runs") / self.name
