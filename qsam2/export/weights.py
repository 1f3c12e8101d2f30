"""Float models on disk: safetensors with the recipe in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsam2.export.files import write_whole
from qsam2.models import SAM2

FORMAT = "qsam2-float"


def save_weights(path: Path, model: SAM2, recipe: dict[str, Any]) -> None:
    """Write a float model's state dict; `qsam2.loading.load_model` and `model.checkpoint=PATH` read it.

    Raises:
        UserError: the file could not be written; no part of it is left.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(path, state, {"format": FORMAT, "recipe": json.dumps(recipe)})
