"""Score any MODEL on any data, against a reference if one is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsam2.loading import load_model
from qsam2.pipeline import open_val
from qsam2.tasks.scoring import compare, score_videos
from qsam2.tasks.stills import score_stills


def evaluate_model(target: str, overrides: Sequence[str] = (), *, reference: str | None = None) -> dict[str, Any]:
    """The score block of a MODEL: J&F on videos, point and box mIoU on stills, in percent.

    Args:
        target: run folder, file or size.
        overrides: `key=value` on top of the model's own recipe.
        reference: another MODEL; adds `fidelity` and `versus_reference` (difference in J&F with its 95 % interval).

    Raises:
        UserError: the model or the data cannot be used.
    """
    model, recipe = load_model(target, overrides)
    videos = open_val(recipe)
    if all(len(video) == 1 for video in videos):
        return {**score_stills(model, videos), "model": target, "fidelity": None}
    folder = Path(".")
    their_block = their_masks = None
    if reference is not None:
        other, _ = load_model(reference, overrides)
        their_block, their_masks = score_videos(other, videos, recipe.evaluate, recipe.trainer, folder=folder)
    block, _ = score_videos(model, videos, recipe.evaluate, recipe.trainer, folder=folder, reference=their_masks)
    if their_block is not None:
        block["versus_reference"] = compare(block, their_block)
    return {**block, "model": target, "fidelity": block.get("fidelity")}
