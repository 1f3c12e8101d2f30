"""Scores of a model on videos and stills, with the comparisons that make them worth trusting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from qsam2.data.sources import open_val
from qsam2.data.unlabelled import has_masks
from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.evaluation.float_scores import Scored, kept
from qsam2.evaluation.images import ITEM_KEYS, score_stills
from qsam2.evaluation.mask_files import check_masks_folder, write_masks
from qsam2.evaluation.metrics.bootstrap import paired_bootstrap
from qsam2.evaluation.own_masks import label_videos
from qsam2.evaluation.video_scoring import VideoScoring
from qsam2.fast.model import FAST_MEMORY, FastSAM2, make_fast
from qsam2.layers.convert import quantizers
from qsam2.loading import load_model
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe import Recipe
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.train.trainer import build_trainer, device_of


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
    module = VideoScoring(model, evaluation, reference=reference, has_truth=has_masks(videos))
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
    return score_stills(model.to(device_of(trainer)), videos, reference=reference)


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

    In J&F; of blocks without true masks in fidelity; of stills in {"point_IoU", "box_IoU"}.
    """
    scores, others = block["per_object"], reference["per_object"]
    if block["protocol"] == "stills":
        return {key: paired_bootstrap(scores, others, key=key) for key in ITEM_KEYS}
    return paired_bootstrap(scores, others, key="fidelity" if block["protocol"] == "fidelity" else "J&F")


def headline(block: Mapping[str, Any]) -> str:
    """The scores of a block as text."""
    keys = [key for key in ("J&F", "J", "F", "fidelity", "point_mIoU", "box_mIoU") if block.get(key) is not None]
    return ", ".join(f"{key} {block[key]:.1f}" for key in keys)


FOLDER = Path(".")
"""Folder for profiles of a Trainer; scoring makes none."""


def evaluate_model(
    target: str,
    overrides: Sequence[str] = (),
    *,
    reference: str | None = None,
    fast: bool = False,
    save_masks: Path | None = None,
) -> dict[str, Any]:
    """The score block of a MODEL: J&F on videos, point and box mIoU on stills, in percent.

    Args:
        target: run folder, file or size.
        overrides: `key=value` on top of the model's own recipe.
        reference: another MODEL, run at the same image size; adds `fidelity` and `versus_reference` (differences in
            J&F or IoU with their 95 % intervals).
        fast: made for speed, see `make_fast`; the reference stays as it is.
        save_masks: new folder for the tracked masks, see `write_masks`.

    Raises:
        UserError: the model or the data cannot be used.
    """
    model, recipe = load_model(target, [*FAST_MEMORY, *overrides] if fast else overrides)
    other = None
    if reference is not None:
        size = recipe.model.image_size
        other, _ = load_model(reference, [*([f"model.image_size={size}"] if size else []), *overrides])
    if fast:
        model = make_fast(model.to(device_of(recipe.trainer)))
    return {"fidelity": None, **score_against(model, other, recipe, save_masks=save_masks), "model": target}


def score_against(
    model: SAM2, reference: SAM2 | None, recipe: Recipe, *, save_masks: Path | None = None
) -> dict[str, Any]:
    """The score block of a model on the recipe's data, with `fidelity` and `versus_reference` if a reference is given.

    The model keeps and reads its memory as the recipe says, the reference as `sam2` does.

    Raises:
        UserError: the data cannot be used.
    """
    videos = open_val(recipe)
    if save_masks is not None:
        check_masks_folder(save_masks, videos)
    if not has_masks(videos):
        if reference is None or next(quantizers(reference), None) is not None:
            raise UserError(
                f"data {recipe.data.scored} has no masks, its score is the fidelity to a float model: give that model "
                "with --reference"
            )
        videos = label_videos(videos, reference.to(device_of(recipe.trainer)), recipe.data.max_objects)
    use_memory(model, recipe.memory)
    compared: dict[str, Any] = {}
    if reference is None:
        score = score_any if isinstance(model, FastSAM2) else score_float  # kept scores are not of fast models
        block, masks = score(model, videos, recipe.evaluate, recipe.trainer, folder=FOLDER)
    else:
        their_block, their_masks = score_float(reference, videos, recipe.evaluate, recipe.trainer, folder=FOLDER)
        block, masks = score_any(model, videos, recipe.evaluate, recipe.trainer, folder=FOLDER, reference=their_masks)
        compared = {"versus_reference": compare(block, their_block)}
    if save_masks is not None:
        write_masks(save_masks, videos, masks, recipe.evaluate)
    return {**block, **compared}
