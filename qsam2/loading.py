"""`MODEL` on the command line: a run folder, a model file that qsam2 wrote, a checkpoint, or a size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qsam2.errors import UserError
from qsam2.export import packed, weights
from qsam2.layers.audit import AuditError, audit
from qsam2.models import SAM2, SIZES, load_sam2
from qsam2.models.checkpoints import guess_size, read_state_dict
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.load import merge


def load_model(target: str | Path, overrides: Sequence[str] = ()) -> tuple[SAM2, Recipe]:
    """A model ready for inference, in eval mode, and its recipe changed by `key=value` overrides.

    Args:
        target: a run folder (its `model.safetensors`), such a file, a checkpoint of any size (`.pt`, `.safetensors`),
            or a size for the float model.

    Raises:
        UserError: there is no such model, it cannot be read, or an override is wrong.
    """
    path = Path(target)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{target} holds no model.safetensors: the run is not finished; run its recipe again")
    if not path.is_file():
        if str(target) in SIZES:
            return _load_float({"model": {"size": str(target)}}, overrides)
        raise UserError(f"{target} is no run folder, no model file and no size ({', '.join(SIZES)})")
    metadata = _metadata(path)
    if metadata.get("format") == packed.FORMAT:
        return _load_packed(path, overrides)
    values = _float_recipe(path, metadata)
    if not values:
        guess = guess_size(read_state_dict(path))
        if guess is None:
            raise UserError(f"{path} is no SAM2 checkpoint that qsam2 knows: its shapes are of no size of SAM 2 or 2.1")
        values = {"model": {"size": guess[0], "version": guess[1]}}
    return _load_float(merge(values, {"model": {"checkpoint": str(path)}}), overrides)


def _load_float(values: dict[str, Any], overrides: Sequence[str]) -> tuple[SAM2, Recipe]:
    recipe = build_recipe(values, overrides)
    if recipe.quantize is not None:
        raise UserError("quantize=... does nothing here: this model is float; run a recipe to quantize it")
    model = load_sam2(
        recipe.model.size,
        version=recipe.model.version,
        checkpoint=recipe.model.checkpoint,
        image_size=recipe.model.image_size,
    )
    return model, recipe


def _load_packed(path: Path, overrides: Sequence[str]) -> tuple[SAM2, Recipe]:
    values = packed.read_header(path).recipe
    recipe = build_recipe(values, overrides)
    own = build_recipe(values)
    if fixed := [key for key in ("model", "quantize") if getattr(recipe, key) != getattr(own, key)]:
        raise UserError(f"{path} is a quantized model: {', '.join(fixed)} cannot be changed by an override")
    model = load_sam2(
        recipe.model.size, version=recipe.model.version, checkpoint=None, image_size=recipe.model.image_size
    )
    rows = packed.load_packed(path, model)
    try:
        audit(model, rows, recipe.quantize)
    except AuditError as error:  # a fault of the program in a model that it made itself, but this one is from a file
        first = str(error).splitlines()[1].strip()
        raise UserError(f"packed model {path} is damaged ({first}): copy or export it again") from error
    return model.eval(), recipe


def _float_recipe(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The recipe that `save_weights` noted, empty where another program wrote the file."""
    if metadata.get("format") != weights.FORMAT:
        return {}
    try:
        values = json.loads(metadata["recipe"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header holds no recipe; copy or export it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: its header holds no recipe; copy or export it again")
    return values


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: truncated or another kind of file; copy or export it again") from error
