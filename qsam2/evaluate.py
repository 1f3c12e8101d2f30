"""Score any MODEL on any data, against a reference if one is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsam2.data.of_recipe import open_val
from qsam2.fast.model import FAST_MEMORY, FastSAM2, make_fast
from qsam2.loading import load_model
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe import Recipe
from qsam2.tasks.scoring import compare, score_any, score_float
from qsam2.tasks.trainer import build_trainer

FOLDER = Path(".")
"""Where profiles of a Trainer would go; scoring makes none."""


def evaluate_model(
    target: str, overrides: Sequence[str] = (), *, reference: str | None = None, fast: bool = False
) -> dict[str, Any]:
    """The score block of a MODEL: J&F on videos, point and box mIoU on stills, in percent.

    Args:
        target: run folder, file or size.
        overrides: `key=value` on top of the model's own recipe.
        reference: another MODEL, run at the same image size; adds `fidelity` and `versus_reference` (differences in
            J&F or IoU with their 95 % intervals).
        fast: made for speed, see `make_fast`; the reference stays as it is.

    Raises:
        UserError: the model or the data cannot be used.
    """
    model, recipe = load_model(target, [*FAST_MEMORY, *overrides] if fast else overrides)
    other = None
    if reference is not None:
        size = recipe.model.image_size
        other, _ = load_model(reference, [*([f"model.image_size={size}"] if size else []), *overrides])
    if fast:
        model = make_fast(model.to(build_trainer(recipe.trainer, folder=FOLDER).strategy.root_device))
    return {"fidelity": None, **score_against(model, other, recipe), "model": target}


def score_against(model: SAM2, reference: SAM2 | None, recipe: Recipe) -> dict[str, Any]:
    """The score block of a model on the recipe's data, with `fidelity` and `versus_reference` if a reference is given.

    The model keeps and reads its memory as the recipe says, the reference as `sam2` does.

    Raises:
        UserError: the data cannot be used.
    """
    videos = open_val(recipe)
    use_memory(model, recipe.memory)
    if reference is None:
        score = score_any if isinstance(model, FastSAM2) else score_float  # kept scores are not of fast models
        return score(model, videos, recipe.evaluate, recipe.trainer, folder=FOLDER)[0]
    their_block, their_masks = score_float(reference, videos, recipe.evaluate, recipe.trainer, folder=FOLDER)
    block, _ = score_any(model, videos, recipe.evaluate, recipe.trainer, folder=FOLDER, reference=their_masks)
    return {**block, "versus_reference": compare(block, their_block)}
