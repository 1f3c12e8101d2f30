"""Scores of a model on videos and stills, with the comparisons that make them worth trusting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from qsam2.data.video import Video
from qsam2.metrics.bootstrap import paired_bootstrap
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.tasks.kept import Scored, kept
from qsam2.tasks.segmentation import Predictions, VideoSegmentation
from qsam2.tasks.stills import ITEM_KEYS, score_stills
from qsam2.tasks.trainer import build_trainer


class _Videos(Dataset["Video | None"]):
    """Videos, and None past the last one."""

    def __init__(self, videos: Sequence[Video]) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Video | None:
        return self.videos[index] if index < len(self.videos) else None


class _RankSampler(Sampler[int]):
    """Every rank scores its share of the videos, none twice: rank r of W takes r, r + W, ..., all as many steps."""

    def __init__(self, length: int) -> None:
        self.length = length

    def _indices(self) -> range:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        steps = -(-self.length // world)  # Lightning wants a batch on every rank, and ranks that stop together
        return range(rank, steps * world, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def __len__(self) -> int:
        return len(self._indices())


def score_videos(
    model: SAM2,
    videos: Sequence[Video],
    evaluation: EvaluateRecipe,
    trainer: TrainerRecipe,
    *,
    folder: Path,
    reference: Predictions | None = None,
    silent: bool = False,
) -> Scored:
    """J&F of semi-supervised tracking by the recipe's protocol, and the masks that were tracked.

    Args:
        reference: the float model's masks on the same videos; with them the block holds `fidelity`.
        silent: whether it shows no progress.

    Returns:
        (score block as design.md has it, in percent; this rank's predictions)
    """
    module = VideoSegmentation(model, None, evaluation, reference=reference)
    loader = DataLoader(_Videos(videos), batch_size=None, sampler=_RankSampler(len(videos)))
    precise = trainer.model_copy(update={"precision": evaluation.precision})
    build_trainer(precise, folder=folder, silent=silent).validate(module, loader, verbose=False)
    return module.block, module.predictions


def score_any(
    model: SAM2,
    videos: Sequence[Video],
    evaluation: EvaluateRecipe,
    trainer: TrainerRecipe,
    *,
    folder: Path,
    reference: Predictions | None = None,
) -> Scored:
    """`score_videos`, or `score_stills` where all have one frame."""
    if any(len(video) > 1 for video in videos):
        return score_videos(model, videos, evaluation, trainer, folder=folder, reference=reference)
    device = build_trainer(trainer, folder=folder).strategy.root_device
    return score_stills(model.to(device), videos, reference=reference)


def score_float(
    model: SAM2, videos: Sequence[Video], evaluation: EvaluateRecipe, trainer: TrainerRecipe, *, folder: Path
) -> Scored:
    """Score the float model that others are compared with, or take its scores from `evaluation.float_cache`."""

    def compute() -> Scored:
        return score_any(model, videos, evaluation, trainer, folder=folder)

    if build_trainer(trainer, folder=folder).world_size > 1:  # each rank has masks of its own videos only
        return compute()
    return kept(model, videos, evaluation, compute)


def compare(block: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Difference between two score blocks on the same objects, with its 95 % interval (paired bootstrap).

    In J&F; between blocks of stills in {"point_IoU", "box_IoU"}.
    """
    if block["protocol"] != "stills":
        return paired_bootstrap(block["per_object"], reference["per_object"])
    return {key: paired_bootstrap(block["per_object"], reference["per_object"], key=key) for key in ITEM_KEYS}
