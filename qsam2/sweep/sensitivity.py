"""Sensitivity of a model to quantization (ours): one group of layers is quantized at a time, the rest stays float."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qsam2.calibration.activation_ranges import find_sam2_ranges
from qsam2.calibration.allocation import SENSITIVITY, Sensitivity, group_of
from qsam2.data.calibration_data import CalibrationData
from qsam2.data.sources import open_train, open_videos
from qsam2.errors import UserError
from qsam2.evaluation.scoring import compare, score_float, score_videos, weights_digest
from qsam2.inputs import read_json
from qsam2.layers.convert import QUANT_ATTENTIONS, QUANT_LAYERS, convert, quantizers, set_state
from qsam2.loading import load_float, load_model
from qsam2.models import SAM2
from qsam2.output import aligned, write_text
from qsam2.quantizers import QuantizerState
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.run import is_first_rank

DEFAULT_QUANTIZERS = {"weights": {"method": "minmax", "bits": 4, "range": "mse"}}


def measure_sensitivity(
    target: str,
    overrides: Sequence[str] = (),
    *,
    bits: Sequence[int] = (2, 4),
    data: str | None = None,
    videos: int = 8,
    frames: int = 16,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure the loss of each group of layers, for its weights at each of `bits` and for its activations.

    The loss is 100 - fidelity, in percent of mean mask IoU with the float model on the first frames of some videos.
    Weights are not calibrated or trained; ranges are calibrated as in the recipe. Every row is written to `output`, a
    JSON file, as soon as it is measured, and the same call goes on from there.

    Args:
        target: run folder, model file or size; a run's quantizers are used with the float model it started from.
        bits: bit widths of the weights; activations have those of the recipe.
        data: `KIND:ROOT:SPLIT`; default: the train split of the recipe's first source.

    Raises:
        UserError: the model or the data cannot be used, rules decide on all layers, or `output` is of another model.
    """
    values = load_model(target)[1].model_dump(mode="json")
    recipe = build_recipe(values if values["quantize"] else {**values, "quantize": DEFAULT_QUANTIZERS}, overrides)
    assert recipe.quantize is not None
    model = load_float(recipe)
    source = data or recipe.data.train[0]
    scored = open_videos(source, root=recipe.data.root, split="train")[:videos]
    if all(len(video) == 1 for video in scored):
        raise UserError(f"{source} holds stills: sensitivity is measured on videos; give --data KIND:ROOT:SPLIT")
    evaluation = recipe.evaluate.model_copy(update={"frames": frames})
    result: dict[str, Any] = {
        "weights": weights_digest(model),
        "quantize": recipe.quantize.model_dump(mode="json"),
        "data": {"source": source, "videos": len(scored), "frames": frames},
        "groups": [],
    }
    result["groups"] = _begun(output, result)
    done = {(row["group"], row["part"], row["bits"]) for row in result["groups"]}
    parts = [("weights", width) for width in bits] if recipe.quantize.weights else []
    if recipe.quantize.activations:
        parts.append(("activations", recipe.quantize.activations.bits))
    todo = [(group, *part) for part in parts for group in groups(model, recipe.quantize, part[0])]
    if not todo:
        raise UserError(f"{target}: its recipe's rules decide on all layers, none is left to measure; give a size")
    todo = [row for row in todo if row not in done]
    if not todo:
        return result

    settings = evaluation, recipe.trainer
    block, masks = score_float(model, scored, *settings)
    for row, quantized in tqdm(_quantized(model, recipe, todo), "sensitivity", len(todo)):
        scores, _ = score_videos(quantized, scored, *settings, reference=masks, silent=True)
        result["groups"].append({**row, "loss": 100 - scores["fidelity"], "J&F": compare(scores, block)})
        if output is not None and is_first_rank():
            write_text(output, json.dumps(result, indent=1))
    return result


def groups(model: SAM2, quantize: QuantizeRecipe, part: str) -> list[str]:
    """Groups of a float model with weights, or activations, whose bits are not set by a rule of the recipe."""
    kinds = set(QUANT_LAYERS) if part == "weights" else {*QUANT_LAYERS, *QUANT_ATTENTIONS}
    layers = (name for name, layer in model.named_modules() if type(layer) in kinds)
    return list(dict.fromkeys(group_of(name) for name in layers if quantize.rule_for(name) is None))


def ranking(result: Mapping[str, Any]) -> str:
    """The groups as text, the most sensitive first: the loss at each bit width, and the worst change in J&F."""
    measured = {(row["group"], row["part"], row["bits"]): row for row in result["groups"]}
    columns = list(dict.fromkeys((part, bits) for _, part, bits in measured))
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in result["groups"]:
        by_group.setdefault(row["group"], []).append(row)
    lines = [["group", *(f"{bits}-bit {part}" for part, bits in columns), "J&F"]]
    for group, rows in sorted(by_group.items(), key=lambda item: -max(row["loss"] for row in item[1])):
        cells = [measured.get((group, *column)) for column in columns]
        worst = min(row["J&F"]["difference"] for row in rows)
        lines.append([group, *(f"{row['loss']:.2f}" if row else "-" for row in cells), f"{worst:+.1f}"])
    return aligned(lines)


def _begun(output: Path | None, result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows that an earlier call has measured."""
    if output is None or not output.is_file():
        return []
    earlier: Sensitivity = read_json(output, Sensitivity, what=SENSITIVITY, advice="give another --json")
    if any(earlier.get(key) != result[key] for key in ("weights", "quantize", "data")):
        raise UserError(f"{output} holds a measurement of another model, quantizer or data: give another --json")
    return list(earlier["groups"])


def _quantized(
    model: SAM2, recipe: Recipe, todo: Sequence[tuple[str, str, int]]
) -> Iterator[tuple[dict[str, Any], SAM2]]:
    """Quantize (group, part, bits) one after another; those of the same part and bits share a converted model."""
    assert recipe.quantize is not None
    for (part, bits), same in itertools.groupby(todo, key=lambda row: row[1:]):
        twin = copy.deepcopy(model)
        other = "activations" if part == "weights" else "weights"
        spec = getattr(recipe.quantize, part).model_copy(update={"bits": bits})
        rows = convert(twin, recipe.quantize.model_copy(update={part: spec, other: None, "allocate": None}))
        find_sam2_ranges(twin, CalibrationData.of(recipe, open_train(recipe), twin.image_size), progress=False)
        free = {row.name for row in rows if recipe.quantize.rule_for(row.name) is None}
        for group, _, _ in same:
            set_state(twin, QuantizerState.FLOAT)
            for name, quantizer in quantizers(twin):
                if name.rpartition(".")[0] in free and group_of(name) == group:
                    quantizer.state = QuantizerState.QUANTIZE
            yield {"group": group, "part": part, "bits": bits}, twin
