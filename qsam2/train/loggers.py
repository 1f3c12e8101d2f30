"""Loggers of a run: training curves as CSV in its folder, and Weights & Biases."""

from __future__ import annotations

import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from qsam2.output import code_version, write_text
from qsam2.recipe.recipe import LogRecipe

CURVES = "curves"
"""Folder of the training curves within the run folder; each start of the run adds `version_*/metrics.csv`."""
WANDB_ID = "wandb/id"
"""File of the Weights & Biases run id within the run folder."""


def build_loggers(recipe: LogRecipe, *, folder: Path, name: str, config: dict[str, Any]) -> list[Logger]:
    """CSV logger (a new version each time the run is resumed) and, unless switched off, Weights & Biases.

    With `recipe.wandb` "auto", W&B is online if a key is configured and offline otherwise. A resumed run continues its
    W&B run.
    """
    loggers: list[Logger] = [CSVLogger(folder, name=CURVES, flush_logs_every_n_steps=1)]
    if recipe.wandb != "off":
        offline = recipe.wandb == "offline" or (recipe.wandb == "auto" and not has_wandb_key())
        loggers.append(
            WandbLogger(
                name=name,
                project=recipe.project,
                group=recipe.group,
                save_dir=folder,
                offline=offline,
                id=_wandb_id(folder),
                resume="allow",
                config={**config, "qsam2": code_version()},
            )
        )
    return loggers


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
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
