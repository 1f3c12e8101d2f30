"""Tracked masks in a file, with the scores they gave: those of float models, and of a run that may be resumed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsam2.data.video import Predictions
from qsam2.errors import UserError
from qsam2.output import write_bytes


def store_masks(file: Path, masks: Predictions, block: Mapping[str, Any] | None = None) -> None:
    """Write masks and their score block as a compressed `.npz`, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    arrays: dict[str, Any] = {str(index): packed for index, packed in enumerate(masks.values())}
    stream = io.BytesIO()
    np.savez_compressed(stream, block=json.dumps(block), names=json.dumps(list(masks)), **arrays)
    write_bytes(file, stream.getvalue())


def stored_masks(file: Path) -> tuple[dict[str, Any] | None, Predictions] | None:
    """(score block or None, masks) that `store_masks` wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as found:
            block, names = json.loads(str(found["block"])), json.loads(str(found["names"]))
            return block, {(video, item): found[str(index)] for index, (video, item) in enumerate(names)}
    except Exception as error:  # whatever zip and NumPy make of such a file
        problem = f"{file} is damaged ({type(error).__name__})"
        raise UserError(f"{problem}: remove it, and the model is scored again") from error
