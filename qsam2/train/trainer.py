"""The one factory of Lightning Trainers.

Every stage that fits or scores gets its Trainer from `build_trainer`, which decides device, strategy, precision and
progress; `training_options` adds what training needs: checkpoints, weight averaging, frozen statistics.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qsam2.errors import UserError
from qsam2.output import write_whole, writing
from qsam2.quantizers import Quantizer
from qsam2.recipe.recipe import Recipe, TrainerRecipe
from qsam2.train.loggers import LogScales

LAST = "last.ckpt"
"""File name, in a run's `checkpoints/`, of the checkpoint that a killed run resumes from in its first stage."""


def stage_checkpoint(index: int) -> str:
    """File name, as `LAST`, for a stage of training."""
    return LAST if index == 0 else f"{index}-{LAST}"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all: the previous one survives a full disk. Reads tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises UserError where the disk is full."""

        def write(file: Path) -> None:
            try:
                TorchCheckpointIO.save_checkpoint(self, checkpoint, file, storage_options)
            except RuntimeError as error:  # torch's own error for a full disk
                raise OSError(str(error)) from error

        path = Path(path)
        try:
            with writing(path):
                for unfinished in path.parent.glob(f"{path.name}.*.tmp"):  # of a process that was killed
                    unfinished.unlink(missing_ok=True)
            write_whole(path, write)
        except UserError as error:
            raise UserError(f"{error}; the previous one is kept: run the same command again to resume") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar on stderr, where all others are, that also starts at the right step in a resumed run."""

    def _on_stderr(self, stage: str) -> Any:
        with contextlib.redirect_stdout(sys.stderr):  # Lightning asks for stdout, where results are printed
            return getattr(TQDMProgressBar, f"init_{stage}_tqdm")(self)

    def init_sanity_tqdm(self) -> Any:
        return self._on_stderr("sanity")

    def init_train_tqdm(self) -> Any:
        return self._on_stderr("train")

    def init_validation_tqdm(self) -> Any:
        return self._on_stderr("validation")

    def init_test_tqdm(self) -> Any:
        return self._on_stderr("test")

    def init_predict_tqdm(self) -> Any:
        return self._on_stderr("predict")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.train_progress_bar.reset(trainer.num_training_batches)
        self.train_progress_bar.initial = trainer.fit_loop.batch_idx + 1


class StopAtSigterm(Callback):
    """Makes SIGTERM end a stage as Ctrl-C does.

    Lightning's own handler broadcasts the signal, which deadlocks if the other ranks wait in another collective; on one
    device it ends training as if it were finished.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Lightning restores the previous handler

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)


class FreezeStatistics(Callback):
    """Freezes the running statistics of all quantizers from a step on: the last steps train the exported grid."""

    def __init__(self, quantizers: Mapping[str, Quantizer], at_step: int) -> None:
        self.quantizers = quantizers
        self.at_step = at_step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        if trainer.global_step >= self.at_step:
            for quantizer in self.quantizers.values():
                quantizer.eval()  # statistics are updated in training mode only; learned clips still learn


class WeightAverage(WeightAveraging):
    """Lightning's exponential moving average of the parameters; buffers are those of the trained model.

    Grids and statistics of quantizers are no averages. Also applied to a run that was killed right after its last step.
    """

    def __init__(self, decay: float) -> None:
        # the lerp of this function leaves frozen parameters exactly as they are
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, module, checkpoint)
        if checkpoint["global_step"] >= trainer.max_steps:  # Lightning skips training, and with it on_train_end
            module.load_state_dict(checkpoint["state_dict"])


def build_trainer(
    recipe: TrainerRecipe,
    *,
    folder: Path,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    silent: bool = False,
    **more: Any,
) -> L.Trainer:
    """A Trainer with the recipe's devices and precision.

    Args:
        folder: run folder, for profiles.
        silent: hide the progress bar, for many short fits or scorings under one bar.
        more: further arguments of Lightning's Trainer.

    Raises:
        UserError: the devices, accelerator or strategy do not exist.
    """
    bar = ProgressBar(refresh_rate=max(recipe.log_every // 2, 1))
    if silent:
        bar.disable()
    try:
        return L.Trainer(
            callbacks=[bar, StopAtSigterm(), *callbacks],
            accelerator=recipe.accelerator,
            devices=recipe.devices,
            num_nodes=recipe.num_nodes,
            strategy=choose_strategy(recipe),
            precision=recipe.precision,
            use_distributed_sampler=False,
            default_root_dir=folder,
            logger=list(loggers) or False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[SafeCheckpointIO()],
            **more,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def choose_strategy(recipe: TrainerRecipe) -> str:
    """Lightning strategy; "auto" on several devices is DDP that allows unused parameters.

    A clip without clicks leaves parts of the prompt encoder without gradients, where plain DDP fails.
    """
    if recipe.strategy != "auto":
        return recipe.strategy
    uses_gpus = recipe.accelerator in ("auto", "gpu", "cuda")
    every_gpu = uses_gpus and recipe.devices in ("auto", -1, "-1") and torch.cuda.device_count() > 1
    several = recipe.devices not in ("auto", 1, "1", -1, "-1")
    return "ddp_find_unused_parameters_true" if recipe.num_nodes > 1 or several or every_gpu else "auto"


def training_options(
    recipe: Recipe, quantizers: Mapping[str, Quantizer], *, checkpoint: str = LAST, ends: bool = True
) -> dict[str, Any]:
    """Arguments of `build_trainer` for a stage of training: steps, clipping, checkpoints, averaging, frozen statistics.

    `checkpoint` is the name of its file; only the stage that `ends` the training averages, and freezes statistics.
    """
    assert recipe.train is not None
    trainer = recipe.trainer
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=recipe.run_folder / "checkpoints",
            filename=checkpoint.removesuffix(".ckpt"),
            every_n_train_steps=trainer.checkpoint_every,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        ),
    ]
    if recipe.train.ema is not None and ends:
        callbacks.append(WeightAverage(recipe.train.ema))
    if quantizers:
        if ends:
            callbacks.append(FreezeStatistics(quantizers, int(recipe.train.freeze_statistics_at * trainer.max_steps)))
        callbacks.append(LogScales(quantizers, trainer.log_every))
    return {
        "max_steps": trainer.max_steps,
        "gradient_clip_val": trainer.gradient_clip or None,
        "accumulate_grad_batches": trainer.accumulate,
        "log_every_n_steps": trainer.log_every,
        "profiler": trainer.profiler,
        "callbacks": callbacks,
        "limit_val_batches": 0,
    }


def device_of(recipe: TrainerRecipe) -> torch.device:
    """Device of the recipe's Trainer; raises UserError as `build_trainer` does."""
    return build_trainer(recipe, folder=Path(".")).strategy.root_device
