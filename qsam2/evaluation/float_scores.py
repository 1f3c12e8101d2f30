"""Scores and masks of float models, kept on disk: runs that start from the same weights need not score them again."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.output import write_whole
from qsam2.recipe.recipe import EvaluateRecipe

Scored = tuple[dict[str, Any], Predictions]
"""A score block and the masks behind it."""


def weights_digest(model: SAM2) -> str:
    """SHA-256 of a model's weights, buffers and image size."""
    digest = hashlib.sha256(str(model.image_size).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def kept(model: SAM2, videos: Sequence[Video], evaluation: EvaluateRecipe, compute: Callable[[], Scored]) -> Scored:
    """Scores and masks from `evaluation.float_cache`, or from `compute` if the cache has none or there is no cache.

    The file's name is the hash of the weights, of how memory is read, of the settings, and of name, length, first frame
    and its masks of every video. It does not know of changes to the evaluator: a new version wants a new folder.

    Raises:
        UserError: a file of the folder is damaged.
    """
    folder = evaluation.float_cache
    if folder is None:
        return compute()
    file = folder / f"{_key(model, videos, evaluation)}.npz"
    if not file.is_file():
        scored = compute()
        _write(file, scored)
        return scored
    try:
        with np.load(file, allow_pickle=False) as arrays:
            block, names = json.loads(str(arrays["block"])), json.loads(str(arrays["names"]))
            return block, {(video, item): arrays[str(index)] for index, (video, item) in enumerate(names)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and the float model is scored again") from error


def _key(model: SAM2, videos: Sequence[Video], evaluation: EvaluateRecipe) -> str:
    settings = evaluation.model_dump_json(include={"protocol", "precision", "frames"})
    memory = model.memory_reader.recipe.model_dump_json() if model.memory_reader else ""
    digest = hashlib.sha256(f"{weights_digest(model)} {settings} {memory}".encode())
    for video in videos:
        digest.update(f"{video.name} {len(video)} {video.size}".encode())
        digest.update(video.frame(0).tobytes())
        for item, mask in sorted((video.masks(0) or {}).items()):
            digest.update(f"{item}".encode() + mask.tobytes())
    return digest.hexdigest()[:32]


def _write(file: Path, scored: Scored) -> None:
    block, masks = scored
    arrays: dict[str, Any] = {str(index): packed for index, packed in enumerate(masks.values())}

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez_compressed(stream, block=json.dumps(block), names=json.dumps(list(masks)), **arrays)

    write_whole(file, write)
