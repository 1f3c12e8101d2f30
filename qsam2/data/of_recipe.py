"""The data that a recipe names: what it trains and calibrates on, what it is scored on."""

from __future__ import annotations

from qsam2.data.clips import Source
from qsam2.data.sources import is_generated, open_videos
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.recipe.recipe import Recipe


def open_val(recipe: Recipe) -> list[Video]:
    """The videos that the recipe scores on."""
    return open_videos(recipe.data.scored, root=recipe.data.root, split="val")[: recipe.evaluate.videos]


def open_stills(recipe: Recipe) -> list[Video]:
    """The images on which masks from boxes are scored; none where the recipe names none."""
    spec = recipe.evaluate.stills
    if spec is None:
        return []
    stills = list(open_videos(spec, root=recipe.data.root, split="val"))
    if any(len(still) > 1 for still in stills):
        raise UserError(f"evaluate.stills={spec}: holds videos; name images, such as coco:FOLDER, or null")
    return stills


def open_train(recipe: Recipe) -> list[Source]:
    """The recipe's train sources with their weights; none where it neither calibrates nor trains."""
    if recipe.quantize is None and recipe.train is None:
        return []
    data = recipe.data
    weights = data.weights or (1.0,) * len(data.train)
    return [
        Source(
            open_videos(source, root=data.root, split="train"),
            weight,
            augment=data.augment is True or (data.augment == "real" and not is_generated(source)),
        )
        for source, weight in zip(data.train, weights, strict=True)
    ]
