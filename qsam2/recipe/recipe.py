"""The recipe: every key that a user can set, with its type, default and meaning. One section per class.

Sections with more than a few keys have modules of their own: `calibrate`, `quantize`, `quantizer_specs`, `train`. The
docstrings are the user's reference (`docs/site/recipe_keys.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from qsam2.recipe.calibrate import CalibrateRecipe, ReconstructRecipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.section import Name, Names, Section, Tags
from qsam2.recipe.source import parts_of
from qsam2.recipe.train import RATES, NonNegative, Precision, Share, TrainRecipe

Sharing = Literal["none", "adaptive", "oldest", "stride", "pool", "sparse", "synthesis"]
Size = Literal["nano", "nano_heavy", "nano_tails", "tiny", "small", "base_plus", "large"]


READ_MEMORY = ("memory_attention.layers.0.cross_attn_image", "memory_attention.layers.0.linear1", "obj_ptr_tpos_proj")
"""Layers that the first frame of a clip does not reach."""


def _written(value: object) -> object:
    return str(value) if isinstance(value, (int, float)) else value  # YAML reads 2.1 as a number


class ModelRecipe(Section):
    """The SAM 2 that the run starts from."""

    size: Size = "nano"
    """Size of the model. nano, nano_heavy and nano_tails (nano with weight tails as the official models', of two kinds)
    ship with qsam2."""
    version: Annotated[Literal["2", "2.1"], BeforeValidator(_written)] = "2.1"
    """Release of the official weights: SAM 2 or SAM 2.1."""
    checkpoint: str | None = "auto"
    """Path of a checkpoint (.pt or .safetensors). auto: the official weights of the size, from the Hugging Face cache
    or its hub; null: random weights, to train from scratch."""
    image_size: int | None = None
    """Side of the square input in pixels, a multiple of 32. null: the size's own, 1024 (nano: 320)."""


class DataRecipe(Section):
    """Data for training, calibration and scoring. A source is written KIND[:ROOT[:SPLIT]], see data/README.md."""

    train: Names = ("moving_objects",)
    """Sources of training clips and of calibration data: one, or a list."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Relative frequency at which each train source is drawn. null: all alike."""
    val: str | None = None
    """Source that is scored. null: the val split of the first train source."""
    root: Path | None = None
    """Folder of the sources that name none."""
    num_frames: PositiveInt = 8
    """Frames per training clip."""
    max_stride: PositiveInt = 1
    """Largest distance between successive frames of a clip; the stride of each clip is drawn from 1 to this."""
    reverse: bool = False
    """Play half of the training clips backwards."""
    max_objects: PositiveInt = 3
    """Most objects per clip; they are drawn from those that its first frame shows."""
    batch_size: PositiveInt = 1
    """Clips per step and device."""
    augment: bool | Literal["real"] = True
    """Augment training clips as Meta's fine-tuning does (flip, affine, colour). real: all but generated clips."""
    num_workers: NonNegativeInt = 2
    """Processes that load data, per device."""

    @property
    def scored(self) -> str:
        """The source that is scored: `val`, or the first train source, whose val split it then is."""
        if self.val is not None:
            return self.val
        kind, root, _ = parts_of(self.train[0])
        return f"{kind}:{root}" if root and kind != "moving_objects" else kind  # its root, without its split

    @model_validator(mode="after")
    def _one_weight_per_source(self) -> DataRecipe:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(f"{len(self.weights)} weights for {len(self.train)} train sources; give one each")
        return self


class TrainerRecipe(Section):
    """Devices and schedule: arguments of Lightning's Trainer, for training, reconstruction and scoring."""

    max_steps: PositiveInt = 2000
    """Training steps of each stage that gives none."""
    accelerator: str = "auto"
    """cpu, cuda, or another name that Lightning knows. auto: a GPU if there is one."""
    devices: int | str = "auto"
    """Number of devices, or processes on the CPU. auto: all GPUs, or one process."""
    num_nodes: PositiveInt = 1
    """Machines of a distributed run."""
    strategy: str = "auto"
    """Lightning's strategy for several devices. auto: DDP."""
    precision: Precision = "32-true"
    """Arithmetic of training: float32, or bfloat16 or float16 by autocast."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile fake quantization: native kernels for float32 on a CPU, else torch.compile. auto: if they are faster, and
    torch.compile only in a run that is long enough to pay for it."""
    gradient_clip: NonNegative = 0.1
    """Largest norm of the gradient; 0: no clipping."""
    accumulate: PositiveInt = 1
    """Batches per training step; their gradients are averaged."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints, from which a stopped run resumes."""
    log_every: PositiveInt = 10
    """Steps between logged values."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Lightning's profiler. null: none."""


class EvaluateRecipe(Section):
    """Scoring of the float and quantized models on `data.val`."""

    protocol: Literal["davis", "sav"] = "davis"
    """Which frames and objects count: as the evaluator of DAVIS or of SA-V has it."""
    precision: Precision = "32-true"
    """Arithmetic of inference, whatever that of training; scores state it."""
    videos: PositiveInt | None = None
    """Score the first N videos. null: all."""
    frames: PositiveInt | None = None
    """Score the first N frames of each video. null: all."""
    stills: str | None = None
    """Images with instances, written as data.val, scored by the mask IoU of one box prompt each. null: none."""
    after_calibration: bool = True
    """Score a run that trains before training as well: the result of calibration alone (PTQ)."""
    every: PositiveInt | None = None
    """Training steps between scores on the way, which the report draws. null: none."""
    float_cache: Path | None = None
    """Folder that keeps scores and masks of float models for other runs on the same data and code. null: none."""


class MemoryRecipe(Section):
    """Memory bank while tracking. Defaults: as sam2 does.

    Conditioning frames (those with prompts) and object pointers are always read in full.
    """

    cache: bool = False
    """Compute keys and values of a remembered frame once. false: again for every frame that reads them."""
    sharing: Sharing = "none"
    """Reading remembered frames by fewer keys: adaptive merges similar neighbours (Q-MiniSAM2); oldest, stride, pool,
    sparse and synthesis are baselines (docs/memory.md)."""
    frames: PositiveInt | None = None
    """Key budget of sharing, in frames, conditioning frames included. From 2 up at least one other frame is read."""
    quantile: Share | None = None
    """Adaptive sharing alone: quantile of the video's similarities above which neighbours share keys. null: only as
    many share as the budget requires."""
    bounded: bool = False
    """Keep only what later frames can still read, so that the state does not grow; the masks are the same."""
    correctable: NonNegativeInt = 32
    """With `bounded`: number of an object's latest tracked frames that stay correctable by points, boxes and masks."""

    @model_validator(mode="after")
    def _sharing_has_a_budget(self) -> MemoryRecipe:
        if self.quantile is not None and self.sharing != "adaptive":
            raise ValueError(f"quantile={self.quantile} is for sharing=adaptive, not {self.sharing}: give null")
        if self.sharing == "none" and self.frames is not None:
            raise ValueError(
                f"frames={self.frames} is a budget of sharing, which is none: give sharing=adaptive, or null"
            )
        if self.sharing != "none" and self.frames is None and self.quantile is None:
            also = " or quantile=Q" if self.sharing == "adaptive" else ""
            raise ValueError(f"sharing={self.sharing} needs a key budget in frames: give frames=N{also}")
        return self

    @property
    def reads_anew(self) -> bool:
        """True if memory is read in another way than sam2's."""
        return self.cache or self.sharing != "none"

    @property
    def mixes(self) -> dict[str, str]:
        """Reasons why keys "k" or values "v" are in float where they are read: sums or averages of quantized ones."""
        shared = self.sharing == "pool" or (self.cache and self.sharing in ("adaptive", "synthesis"))
        reason = f"memory.sharing={self.sharing} averages quantized keys and values"
        if shared:
            return {"k": reason, "v": reason}
        return {"k": "memory.cache adds a quantized key and a quantized temporal position"} if self.cache else {}


class LogRecipe(Section):
    """Logging to Weights & Biases; CSV files of the curves are always written to the run folder."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online if an API key is configured, else offline."""
    entity: str | None = None
    """User or team that owns the project. null: the account's own."""
    project: str = "qsam2"
    """Project that runs are logged to."""
    group: str | None = None
    """Group that the run belongs to; a sweep sets its own name."""
    job_type: str | None = None
    """Kind of run within its group, as "ptq" or "qat"."""
    tags: Tags = ()
    """Words to filter runs by: one, or a list."""
    notes: str | None = None
    """Remark on the run."""


class Recipe(Section):
    """One run, from checkpoint to report. Sections that are null by default are stages that a run can leave out."""

    name: Name = "run"
    """Name of the run."""
    output: Path | None = None
    """Run folder. null: runs/NAME, of sizes other than nano runs/NAME-SIZE."""
    seed: NonNegativeInt = 0
    """Seed of all random draws."""
    debug: Literal["fast", "overfit", "profile"] | None = None
    """Values for a trial, laid over the file: fast, two steps of everything; overfit, one clip again and again;
    profile, 20 steps and the time that they take. null in a resolved recipe, which holds the values."""
    model: ModelRecipe = ModelRecipe()
    """The SAM 2 that the run starts from."""
    data: DataRecipe = DataRecipe()
    """Data for training, calibration and scoring."""
    calibrate: CalibrateRecipe = CalibrateRecipe()
    """Calibration data, and changes to the float weights before they are quantized."""
    quantize: QuantizeRecipe | None = None
    """Quantizers of weights and activations. null: the model stays in float."""
    reconstruct: ReconstructRecipe | None = None
    """Block-wise fitting of rounding, weights and steps, after calibration. null: none."""
    train: TrainRecipe | None = None
    """Training: QAT if the recipe quantizes, else of the float model. null: none (PTQ)."""
    trainer: TrainerRecipe = TrainerRecipe()
    """Devices and schedule."""
    evaluate: EvaluateRecipe = EvaluateRecipe()
    """Scoring."""
    memory: MemoryRecipe = MemoryRecipe()
    """Memory bank of the quantized model."""
    log: LogRecipe = LogRecipe()
    """Logging to Weights & Biases."""

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Recipe:
        calibrate, reconstruct, train, quantize = self.calibrate, self.reconstruct, self.train, self.quantize
        weights = None if quantize is None else quantize.weights
        activations = quantize is not None and quantize.activations is not None
        for key in ("weights", "rounding"):
            if (method := getattr(calibrate, key)) is not None and weights is None:
                raise ValueError(
                    f"calibrate.{key}={method.method} needs quantized weights: give quantize.weights, or null here"
                )
        if quantize is not None and calibrate.num_frames == 1:
            plans = [quantize.plan(layer) for layer in READ_MEMORY]
            fits = calibrate.rounding is not None or reconstruct is not None or quantize.allocate is not None
            if any(plan.activations or (plan.weights and fits) for plan in plans):
                raise ValueError(
                    "calibrate.num_frames=1 reaches no layer that reads memory, as the second frame of a clip is the "
                    "first to do: give num_frames=2 or more, or keep memory_attention.* and obj_ptr_tpos_proj in float"
                )
        if calibrate.smooth is not None and not activations:
            raise ValueError("calibrate.smooth needs quantized activations: give quantize.activations, or null here")
        if calibrate.rounding is not None and train is not None and weights is not None and weights.method == "dorefa":
            raise ValueError(
                f"calibrate.rounding={calibrate.rounding.method} starts training in the cells of its integers, but "
                "dorefa rounds the tanh of weights: give quantize.weights another method, or null here"
            )
        if quantize is None and train is not None and train.distill.needs_teacher:
            raise ValueError(
                "train.distill follows the float model (all of its losses but imagenet), but quantize=null trains just "
                "that: set them to 0, or give quantize"
            )
        named = {source for stage in train.stages for source in stage.sources or ()} if train is not None else set()
        if unknown := sorted(named - set(self.data.train)):
            raise ValueError(f"train.stages: sources={unknown[0]} is none of data.train: {', '.join(self.data.train)}")
        if train is not None and not train.stages[-1].own_bits:
            raise ValueError("train.stages: the last stage trains other bits than the run ships: leave them out there")
        for key in ("weights", "activations"):
            changes = train is not None and any(getattr(stage, key) is not None for stage in train.stages)
            if changes and (quantize is None or getattr(quantize, key) is None):
                raise ValueError(f"train.stages: {key} are in float anyway: give quantize.{key}, or null here")
        for index, bits in enumerate(stage.weights for stage in train.stages) if train is not None else ():
            if quantize is not None and isinstance(bits, int) and bits <= quantize.fewest_weight_bits:
                raise ValueError(
                    f"train.stages.{index}: weights={bits} changes no layer, as quantize gives them all "
                    f"{quantize.fewest_weight_bits} bits or more: give more bits than that, float, or null"
                )
        if train is not None and any(stage.kind == "stills" for stage in train.stages):
            if quantize is None:
                raise ValueError(
                    "train.stages: kind=stills follows the embeddings of the float model, but quantize=null trains "
                    "just that: give kind=clips, or quantize"
                )
            if not train.image_encoder_lr:
                raise ValueError(
                    "train.stages: kind=stills trains the image encoder, which image_encoder_lr=0 leaves as it is: "
                    "give kind=clips, or a rate"
                )
        if reconstruct is not None:
            stage = f"reconstruct.method={reconstruct.method}"
            if weights is None:
                raise ValueError(f"{stage} fits the rounding of weights: give quantize.weights")
            if reconstruct.method == "qdrop" and not activations:
                raise ValueError(
                    f"{stage} drops the quantization of activations, but these are in float: give "
                    "quantize.activations, or method=brecq"
                )
            if train is not None and reconstruct.method != "block_ap":
                raise ValueError(
                    f"{stage} ends at integers that training cannot move from: give method=block_ap, train=null, or "
                    "reconstruct=null"
                )
        return self

    @property
    def training(self) -> list[Recipe]:
        """One recipe per stage of training, with the stage's values in their sections; none without training."""
        if self.train is None:
            return []
        recipes = []
        for stage in self.train.stages:
            rates = {key: getattr(self.train, key) * stage.rate for key in RATES}
            frames = 1 if stage.kind == "stills" else stage.num_frames or self.data.num_frames
            data: dict[str, Any] = {"num_frames": frames, "batch_size": stage.batch_size or self.data.batch_size}
            if stage.sources is not None:
                chosen = [index for index, source in enumerate(self.data.train) if source in stage.sources]
                data["train"] = tuple(self.data.train[index] for index in chosen)
                if self.data.weights is not None:
                    data["weights"] = tuple(self.data.weights[index] for index in chosen)
            precision = stage.precision or self.trainer.precision
            trainer = {"max_steps": stage.steps or self.trainer.max_steps, "precision": precision}
            changes = {
                "train": self.train.model_copy(update={"stages": (stage,), **rates}),
                "data": self.data.model_copy(update=data),
                "trainer": self.trainer.model_copy(update=trainer),
            }
            recipes.append(self.model_copy(update=changes))
        return recipes

    @property
    def run_folder(self) -> Path:
        """Folder of the run's files; runs of one recipe at several sizes have one each."""
        size = "" if self.model.size == "nano" or self.model.size in self.name else f"-{self.model.size}"
        return Path(os.path.expanduser(self.output)) if self.output else Path("runs") / f"{self.name}{size}"
