"""The stage that writes a run's model, and its quantization card: source, method, data, accuracy, size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qsam2.data.unlabelled import OWN_MASKS, is_unlabelled
from qsam2.evaluation.metrics.interval import interval_note, interval_text
from qsam2.evaluation.metrics.scores import amount_text, remarks
from qsam2.formats.packed import model_bytes, save_packed, save_weights
from qsam2.layers.products import VALUES, products
from qsam2.models.checkpoints import find_checkpoint
from qsam2.models.sam2 import EMBEDDED
from qsam2.output import listed, version, write_text
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.portable import portable
from qsam2.recipe.quantize import ConvertedLayer
from qsam2.run import Run

NANO_LICENCE = (
    "made from the weights of nano: non-commercial research and evaluation, as their training data allow; see "
    "qsam2/models/nano/nano.md, Licence of the weights"
)
OWN_LICENCE = "that of the data it was trained on: the weights were random at first"
OFFICIAL_LICENCE = "that of the source checkpoint (SAM 2 and 2.1: Apache-2.0)"
HEADLINE = ("J&F", "J", "F", "fidelity", "box_mIoU", "versus_float", "scored")
"""Scores of a model that the card states."""


def export_model(run: Run) -> None:
    """Stage: write the model, packed with its card if it is quantized."""
    recipe, folder = run.recipe, run.folder
    folder.record("bytes", model_bytes(run.model))
    if run.silent:
        return
    values = portable(recipe.model_dump(mode="json"))
    if recipe.quantize is None:
        save_weights(folder.model, run.model, values)
        return
    save_packed(folder.model, run.model, values)
    card = build_card(folder.metrics, recipe, run.layers)
    write_text(folder.path / "card.json", json.dumps(card, indent=1))
    write_text(folder.path / "card.md", render(card))


def build_card(metrics: dict[str, Any], recipe: Recipe, layers: list[ConvertedLayer]) -> dict[str, Any]:
    """The card as plain values, the content of `card.json`."""
    calibrate, values = recipe.calibrate, portable(recipe.model_dump(mode="json"))
    protocol = metrics.get("quantized", {}).get("protocol", recipe.evaluate.protocol)
    models = [name for name in ("float", "ptq", "quantized") if name in metrics]
    scored = metrics[models[-1]] if models else {}
    scores = {name: {key: metrics[name][key] for key in HEADLINE if key in metrics[name]} for name in models}
    without_masks = any(is_unlabelled(spec) for spec in (*recipe.data.train, recipe.data.scored))
    return {
        "name": recipe.name,
        "qsam2": version(),
        "source": checkpoint_source(recipe),
        "licence": weights_licence(recipe),
        "method": recipe.quantize.model_dump(mode="json") if recipe.quantize else None,
        "training_steps": sum(stage.trainer.max_steps for stage in recipe.training),
        "calibration": {
            "sources": values["data"]["train"],
            "stills": calibrate.stills,
            "clips": calibrate.clips,
            "frames_a_clip": calibrate.num_frames,
            "seed": recipe.seed,
            "fitted": [
                *([f"weights ({calibrate.weights.method})"] if calibrate.weights else []),
                *(["scales of LayerNorms (smoothquant)"] if calibrate.smooth else []),
                "ranges",
                *([f"rounding ({calibrate.rounding.method})"] if calibrate.rounding else []),
                *([f"rounding and activation steps ({recipe.reconstruct.method})"] if recipe.reconstruct else []),
            ],
        },
        "evaluation": {
            "data": build_recipe(values).data.scored,
            "protocol": protocol,
            "evaluator": f"qsam2 {version()}",
            "scored": amount_text(scored),
            "left_out": scored.get("left_out", {}),
            "interval": interval_note(versus) if (versus := scored.get("versus_float")) else None,
        },
        **({"prompts": OWN_MASKS} if without_masks else {}),
        "scores": scores,
        "bytes": metrics.get("bytes"),
        "format": "packed integers in safetensors, see docs/packed.md",
        "float_layers": {
            row.name: row.reason for row in layers if row.weight_bits is None and "Attention" not in row.kind
        },
        "float_products": {
            f"{row.name}: {row.what}": row.reason for row in products(layers, recipe.memory) if None in row.bits
        },
        "recipe": values,
    }


def render(card: dict[str, Any]) -> str:
    """The card as Markdown, the content of `card.md`."""

    def quantizer(spec: dict[str, Any] | None) -> str:
        return "in float" if spec is None else f"at {spec['bits']} bits ({spec['method']})"

    def score_row(name: str, scores: dict[str, Any]) -> str:
        numbers = (scores.get(key) for key in ("J&F", "J", "F", "fidelity"))
        j_and_f, j, f, fidelity = ("" if number is None else f"{number:.1f}" for number in numbers)
        versus = scores.get("versus_float")
        return f"| {name} | {j_and_f} | {j} | {f} | {interval_text(versus) if versus else ''} | {fidelity} |"

    source, method, calibration = card["source"], card["method"], card["calibration"]
    lines = [
        f"# {card['name']}",
        "",
        f"SAM {source['version']} {source['size']} quantized by qsam2 {card['qsam2']}: "
        f"weights {quantizer(method['weights'])}, activations {quantizer(method['activations'])}; "
        f"{card['training_steps']} steps of quantization-aware training.",
        "",
        f"- Source checkpoint: {source['checkpoint']}, SHA-256 {source['sha256']}",
        f"- Licence: {card['licence']}",
        f"- Calibration: {calibration['stills']} stills and {calibration['clips']} clips of "
        f"{calibration['frames_a_clip']} frames from {', '.join(calibration['sources'])}, "
        f"seed {calibration['seed']}; fitted: {', '.join(calibration['fitted'])}",
        f"- Evaluation: {card['evaluation']['data']}, {card['evaluation']['protocol']} protocol, "
        f"{card['evaluation']['evaluator']}: {card['evaluation']['scored'] or 'nothing yet'}",
        *(f"- Not scored: {text}" for text in remarks(card["evaluation"]["left_out"])),
        *([f"- Intervals: {card['evaluation']['interval']}"] if card["evaluation"]["interval"] else []),
        *([f"- Prompts where the data has no masks: {card['prompts']}"] if "prompts" in card else []),
        f"- Format: {card['format']}",
        "",
        "| model | J&F | J | F | difference to float, 95 % interval | fidelity |",
        "|---|---|---|---|---|---|",
        *(score_row(name, scores) for name, scores in card["scores"].items()),
        "",
        "| format | bytes |",
        "|---|---|",
        *(f"| {name} | {value:,} |" for name, value in (card["bytes"] or {}).items()),
        "",
        "Layers with float weights:",
        "",
        *([f"- `{name}`: {reason}" for name, reason in card["float_layers"].items()] or ["- none"]),
        "",
        "Products with an operand in float:",
        "",
        *_by_product(card["float_products"]),
        "",
    ]
    return "\n".join(lines)


def weights_licence(recipe: Recipe) -> str:
    """The licence of a model made by a recipe, as far as its source tells."""
    if recipe.model.checkpoint is None:
        return OWN_LICENCE
    return NANO_LICENCE if recipe.model.size in EMBEDDED else OFFICIAL_LICENCE


def _by_product(rows: dict[str, str]) -> list[str]:
    """Lines of the products in float, those of one kind and reason in one."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name, reason in rows.items():
        layer, what = name.rsplit(": ", 1)
        layers.setdefault((what, "" if what == VALUES else reason), []).append(layer)
    return [
        f"- {what}: {listed(names)}" + (f" ({reason})" if reason else "") for (what, reason), names in layers.items()
    ]


def checkpoint_source(recipe: Recipe) -> dict[str, Any]:
    """Size, version, file and hash of the checkpoint that a recipe starts from."""
    model = recipe.model
    source = {"size": model.size, "version": model.version, "checkpoint": model.checkpoint, "sha256": None}
    if model.checkpoint is not None:
        path = find_checkpoint(model.size, model.version) if model.checkpoint == "auto" else Path(model.checkpoint)
        source |= {"checkpoint": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return source
