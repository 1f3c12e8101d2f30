"""Reconstruction of one block: a Lightning module fits its rounding and steps (BRECQ, arXiv 2102.05426).

minimise E (output - float output)^2 / variance + regularization of the rounding. Errors relative to the variance of
each output (ours) make one regularization weight suit all blocks.

Block-AP (EfficientQAT, arXiv 2407.11062) minimises the error alone, over weights, biases, learned steps and clips, with
the straight-through gradient of fake quantization: what training does, on one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from qsam2.errors import UserError
from qsam2.layers.convert import quantized_weights, quantizers
from qsam2.recipe.calibrate import HierarchyRecipe, ReconstructRecipe
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.reconstruction.blocks import Call, output_tensors
from qsam2.reconstruction.rounding import (
    beta_at,
    flipped_share,
    harden,
    learn_steps,
    learned_steps,
    soft_roundings,
    soften_weights,
)
from qsam2.train.optimizer import QUANTIZER_EPS, cosine_share, frozen
from qsam2.train.trainer import build_trainer
from qsam2.train.video_training import attention_backend


@dataclass(frozen=True)
class ReconstructedBlock:
    """Result for one block. Errors: E (output - float output)^2 over the float outputs' variance, hard-rounded."""

    name: str
    calls: int
    """Number of calls that the block was fitted to."""
    error: tuple[float, float]
    """Error before the fit (by nearest rounding), and of the block as it is now."""
    kept: bool
    """True if the fit was better; otherwise the block is unchanged."""
    flipped: float
    """Share of weights that are not rounded to the level that was nearest before the fit."""


class Fit(L.LightningModule):
    """Trains soft roundings, or weights, and learned steps of a network by a loss of (batch, step); the rest is frozen.

    The rate of roundings is constant, those of weights and steps fall to 0 as a cosine.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, int], Tensor],
        recipe: ReconstructRecipe | HierarchyRecipe,
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.network, self.loss, self.recipe, self.stopped = network, loss, recipe, stopped
        self.roundings = [rounding.v for rounding in soft_roundings(network)]
        self.steps = [step.log_scale for step in learned_steps(network)]
        self.weights: list[nn.Parameter] = []
        if isinstance(recipe, ReconstructRecipe) and recipe.method == "block_ap":
            self.steps = [parameter for _, quantizer in quantizers(network) for parameter in quantizer.parameters()]
            steps = {id(parameter) for parameter in self.steps}
            self.weights = [parameter for parameter in network.parameters() if id(parameter) not in steps]

    def run(self, trainer_recipe: TrainerRecipe, folder: Path, batches: Iterable[Any], *, silent: bool = False) -> None:
        """Fit the network in place, on the device where it is."""
        device = next(self.network.parameters()).device
        learned = {id(parameter) for parameter in (*self.roundings, *self.steps, *self.weights)}
        others = (parameter for parameter in self.network.parameters() if id(parameter) not in learned)
        options: dict[str, Any] = {"max_steps": self.recipe.iterations, "limit_val_batches": 0}
        trainer = build_trainer(trainer_recipe, folder=folder, silent=silent, enable_checkpointing=False, **options)
        with frozen(others):
            try:
                trainer.fit(self, batches)
            finally:
                self.network.to(device)  # Lightning leaves it on the CPU

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        if self.stopped():
            self.trainer.should_stop = True
        loss = self.loss(batch, batch_index)
        if not torch.isfinite(loss):
            of_blocks = isinstance(self.recipe, ReconstructRecipe)
            key, rate = ("reconstruct", "reconstruct.lr") if of_blocks else ("reconstruct.video", "its step_lr")
            raise UserError(f"{key}: the loss is {float(loss)} at step {batch_index}; lower {rate}")
        return loss

    def configure_optimizers(self) -> Any:
        rate = self.recipe.rate if isinstance(self.recipe, ReconstructRecipe) else 0.0
        groups = [
            {"params": self.roundings, "lr": rate},
            {"params": self.steps, "lr": self.recipe.step_lr, "eps": QUANTIZER_EPS},
            {"params": self.weights, "lr": rate},
        ]
        optimizer = torch.optim.Adam(groups)
        falling = partial(cosine_share, max_steps=self.recipe.iterations, end=0.0)
        shares: list[Callable[[int], float]] = [lambda _: 1.0, falling, falling]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def block_error(block: nn.Module, call: Call, variances: Sequence[Tensor]) -> Tensor:
    """Squared error of a block's outputs over their variances, summed over outputs; a scalar."""
    outputs = output_tensors(block(*call.args, **call.kwargs))
    errors = [
        (output.float() - target).square().mean() / variance.to(output.device)
        for output, target, variance in zip(outputs, call.targets, variances, strict=True)
    ]
    return torch.stack(errors).sum()


def target_variances(calls: Sequence[Call]) -> list[Tensor]:
    """Variance of each output of the float block over all calls; 1 if it is constant."""
    variances = []
    for outputs in zip(*(call.targets for call in calls), strict=True):
        count = sum(output.numel() for output in outputs)
        mean = sum(output.double().sum() for output in outputs) / count
        variance = sum((output.double() - mean).square().sum() for output in outputs) / count
        variances.append((variance if variance > 0 else torch.ones_like(variance)).float())
    return variances


@torch.no_grad()
def mean_error(block: nn.Module, calls: Sequence[Call], variances: Sequence[Tensor], device: torch.device) -> float:
    """Mean of `block_error` over all calls."""
    errors = [block_error(block, move_data_to_device(call, device), variances) for call in calls]
    return float(torch.stack(errors).mean())


def fit_block(
    name: str,
    block: nn.Module,
    calls: Sequence[Call],
    recipe: ReconstructRecipe,
    trainer_recipe: TrainerRecipe,
    *,
    folder: Path,
    image_size: int,
    seed: int,
    stopped: Callable[[], bool],
) -> ReconstructedBlock | None:
    """Reconstruct a calibrated block in place; it stays as it was if the fit is no better on `calls`.

    None, with the block unchanged, if `stopped()` became True meanwhile.
    """
    device, trains = next(block.parameters()).device, recipe.method == "block_ap"
    variances = target_variances(calls)
    nearest = mean_error(block, calls, variances, device)
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    count = recipe.iterations * recipe.batch_size
    sampler = RandomSampler(calls, replacement=True, num_samples=count, generator=torch.Generator().manual_seed(seed))

    def loss(batch: list[Call], step: int) -> Tensor:
        with attention_backend(device, image_size):
            error = torch.stack([block_error(block, call, variances) for call in batch]).mean()
        beta = beta_at(step / recipe.iterations, recipe.warmup)
        if beta is None or trains:
            return error
        penalties = [rounding.regularization(beta) for rounding in soft_roundings(block)]
        return error + recipe.regularization * torch.stack(penalties).sum()

    torch.manual_seed(seed)
    if trains:
        integers = _integers(block)
    else:
        soften_weights(block)
        if recipe.method != "adaround":
            learn_steps(block, drop=recipe.drop if recipe.method == "qdrop" else 0.0)
    batches: Any = DataLoader(calls, recipe.batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
    try:
        Fit(block, loss, recipe, stopped).run(trainer_recipe, folder, batches, silent=True)
    finally:
        flipped = float((_integers(block) != integers).float().mean()) if trains else flipped_share(block)
        harden(block)
    fitted = mean_error(block, calls, variances, device)
    kept = fitted < nearest and not stopped()
    if not kept:
        block.load_state_dict(before)
    if stopped():
        return None
    after, share = (fitted, flipped) if kept else (nearest, 0.0)
    return ReconstructedBlock(name, len(calls), (nearest, after), kept, share)


def _integers(block: nn.Module) -> Tensor:
    """Codes of all quantized weights of a block, one after another."""
    return torch.cat([quantizer.to_int(layer.weight).flatten() for _, layer, quantizer in quantized_weights(block)])
