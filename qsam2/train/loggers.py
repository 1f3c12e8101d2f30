"""Loggers of a run: CSV files of its curves, and Weights & Biases, an error of which costs a run only its log there."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from qsam2.output import code_version, write_text
from qsam2.quantizers import Quantizer
from qsam2.recipe import Recipe
from qsam2.recipe.portable import portable

log = logging.getLogger("qsam2")
T = TypeVar("T")

CURVES = "curves"
"""Folder of the training curves within the run folder; each start of the run adds `version_*/metrics.csv`."""
WANDB_ID = "wandb/id"
"""File of the Weights & Biases run id within the run folder."""
SCALE = "scale/"
"""Prefix of the step size of each quantizer: hundreds of curves, which W&B gets as quantiles alone."""

QUANTILES = (0.1, 0.5, 0.9)


class Wandb(WandbLogger):
    """Lightning's logger to W&B. Its first error is a warning, after which nothing is logged there."""

    failed = False

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Do some work and return its result; None if it fails, which is a warning, or if anything failed before."""
        if self.failed:
            return None
        try:
            return work()
        except Exception as error:  # no network, no key, no room, a home that cannot be written, a dead service, ...
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("Weights & Biases: %s; the run goes on and is not logged there any more", reason)
            return None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B; one that does nothing after an error."""
        run = self.attempt(lambda: super(Wandb, self).experiment)
        return DummyExperiment() if run is None else run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All metrics but the step size of each quantizer."""
        kept = {name: value for name, value in metrics.items() if not name.startswith(SCALE)}
        if kept:
            self.attempt(lambda: super(Wandb, self).log_metrics(kept, step))

    def log_hyperparams(self, params: Any) -> None:
        """See Lightning."""
        self.attempt(lambda: super(Wandb, self).log_hyperparams(params))


class LogScales(Callback):
    """Logs step sizes every `every` steps, where a training that diverges shows first.

    `scale/NAME` is the mean step size of a quantizer. `step_size/ROLE_p10`, `_p50` and `_p90` are quantiles, over all
    weights or activations, of step sizes as multiples of the first that were logged.
    """

    def __init__(self, quantizers: Mapping[str, Quantizer], every: int) -> None:
        self.quantizers = quantizers
        self.every = every
        self.first: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The first step sizes: a resumed run compares with them."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.first = state_dict["first"]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        names = list(self.quantizers)
        scales = torch.stack([self.quantizers[name].scale.detach().float().mean() for name in names])
        module.log_dict({f"{SCALE}{name}": scale for name, scale in zip(names, scales, strict=True)})
        self.first = self.first or dict(zip(names, scales.tolist(), strict=True))
        ratios = scales / scales.new_tensor([self.first[name] for name in names])
        for role in ("weight", "activation"):
            if own := [index for index, name in enumerate(names) if self.quantizers[name].role == role]:
                values = ratios[own].quantile(ratios.new_tensor(QUANTILES))
                keys = (f"step_size/{role}s_p{100 * share:.0f}" for share in QUANTILES)
                module.log_dict(dict(zip(keys, values, strict=True)))


def build_loggers(recipe: Recipe) -> list[Logger]:
    """CSV logger (a new version each time the run is resumed) and, unless switched off, Weights & Biases.

    With `log.wandb` "auto", W&B is online if a key is configured and offline otherwise. A resumed run continues its W&B
    run.
    """
    settings, folder = recipe.log, recipe.run_folder
    loggers: list[Logger] = [CSVLogger(folder, name=CURVES, flush_logs_every_n_steps=1)]
    if settings.wandb == "off":
        return loggers
    try:
        offline = settings.wandb == "offline" or (settings.wandb == "auto" and not has_wandb_key())
        logger = Wandb(
            name=recipe.name,
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            job_type=settings.job_type,
            tags=list(settings.tags) or None,
            notes=settings.notes,
            save_dir=folder,
            offline=offline,
            id=_wandb_id(folder),
            resume="allow",
            config={**portable(recipe.model_dump(mode="json")), "qsam2": code_version()},
        )
    except Exception as error:  # as in `Wandb.attempt`
        log.warning("Weights & Biases: %s; the run is not logged there", " ".join(str(error).split()))
        return loggers
    return [*loggers, logger]


@rank_zero_only
def _wandb_id(folder: Path) -> str:
    """W&B run id: WANDB_RUN_ID if a sweep agent sets it, else a random one kept in the run folder."""
    if agent_id := os.environ.get("WANDB_RUN_ID"):
        return agent_id
    file = folder / WANDB_ID
    if not file.is_file():
        write_text(file, secrets.token_hex(4))
    return file.read_text()


def has_wandb_key() -> bool:
    """True if WANDB_API_KEY is set or `wandb login` was done (wandb's own check would prompt for a key)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # absent, unreadable, not text, no address
        return False
