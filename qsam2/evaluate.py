"""Score any MODEL on any data, against a reference if one is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsam2.data.video import Video
from qsam2.loading import load_model
from qsam2.models import SAM2
from qsam2.pipeline import open_val
from qsam2.recipe import Recipe
from qsam2.tasks.scoring import compare, score_videos
from qsam2.tasks.stills import score_stills
from qsam2.tasks.trainer import build_trainer

FOLDER = Path(".")
"""Where profiles of a Trainer would go; scoring makes none."""


def evaluate_model(target: str, overrides: Sequence[str] = (), *, reference: str | None = None) -> dict[str, Any]:
    """The score block of a MODEL: J&F on videos, point and box mIoU on stills, in percent.

    Args:
        target: run folder, file or size.
        overrides: `key=value` on top of the model's own recipe.
        reference: another MODEL, run at the same image size; adds `fidelity` and `versus_reference` (differences in
            J&F or IoU with their 95 % intervals).

    Raises:
        UserError: the model or the data cannot be used.
    """
    model, recipe = load_model(target, overrides)
    videos = open_val(recipe)
    other = None
    if reference is not None:
        size = recipe.model.image_size
        other, _ = load_model(reference, [*([f"model.image_size={size}"] if size else []), *overrides])
    if all(len(video) == 1 for video in videos):
        device = build_trainer(recipe.trainer, folder=FOLDER).strategy.root_device
        block = score_stills(model.to(device), videos, reference=other and other.to(device))
    else:
        block = _score_videos(model, other, videos, recipe)
    return {**block, "model": target, "fidelity": block.get("fidelity")}


def _score_videos(model: SAM2, other: SAM2 | None, videos: list[Video], recipe: Recipe) -> dict[str, Any]:
    their_block = their_masks = None
    if other is not None:
        their_block, their_masks = score_videos(other, videos, recipe.evaluate, recipe.trainer, folder=FOLDER)
    block, _ = score_videos(model, videos, recipe.evaluate, recipe.trainer, folder=FOLDER, reference=their_masks)
    if their_block is not None:
        block["versus_reference"] = compare(block, their_block)
    return block
