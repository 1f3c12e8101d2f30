"""The stage that writes a run's model, and its quantization card: source, method, data, accuracy, size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qsam2.data.unlabelled import OWN_MASKS, is_unlabelled
from qsam2.formats.packed import model_bytes, save_packed, save_weights
from qsam2.models.checkpoints import find_checkpoint
from qsam2.output import version, write_text
from qsam2.recipe import Recipe
from qsam2.recipe.quantize import ConvertedLayer
from qsam2.run import Run, RunFolder

LICENCES = {"nano": "Apache-2.0; see the model card of nano for its training data"}
OFFICIAL_LICENCE = "that of the source checkpoint (SAM 2 and 2.1: Apache-2.0)"


def export_model(run: Run) -> None:
    """Stage: write the model, packed with its card if it is quantized."""
    recipe, folder = run.recipe, run.folder
    folder.record("bytes", model_bytes(run.model))
    if run.silent:
        return
    values = recipe.model_dump(mode="json")
    if recipe.quantize is None:
        save_weights(folder.model, run.model, values)
    else:
        save_packed(folder.model, run.model, values)
        write_card(folder, recipe, run.layers)


def write_card(folder: RunFolder, recipe: Recipe, layers: list[ConvertedLayer]) -> None:
    """Write `card.json` and `card.md` into a run folder."""
    card = build_card(folder.metrics, recipe, layers)
    write_text(folder.path / "card.json", json.dumps(card, indent=1))
    write_text(folder.path / "card.md", render(card))


def build_card(metrics: dict[str, Any], recipe: Recipe, layers: list[ConvertedLayer]) -> dict[str, Any]:
    """The card as plain values, the content of `card.json`."""
    protocol = metrics.get("quantized", {}).get("protocol", recipe.evaluate.protocol)
    without_masks = any(is_unlabelled(spec) for spec in (*recipe.data.train, recipe.data.scored))
    return {
        "name": recipe.name,
        "qsam2": version(),
        "source": checkpoint_source(recipe),
        "licence": LICENCES.get(recipe.model.size, OFFICIAL_LICENCE),
        "method": recipe.quantize.model_dump(mode="json") if recipe.quantize else None,
        "training_steps": recipe.trainer.max_steps if recipe.train else 0,
        "calibration": {
            "sources": list(recipe.data.train),
            "stills": recipe.calibrate.stills,
            "clips": recipe.calibrate.clips,
            "frames_a_clip": recipe.calibrate.num_frames,
            "seed": recipe.seed,
            "fitted": _fitted(recipe),
        },
        "evaluation": {
            "data": recipe.data.scored,
            "protocol": protocol,
            "evaluator": f"qsam2 {version()}",
        },
        **({"prompts": OWN_MASKS} if without_masks else {}),
        "scores": {name: _headline(metrics[name]) for name in ("float", "ptq", "quantized") if name in metrics},
        "bytes": metrics.get("bytes"),
        "format": "packed integers in safetensors, see docs/packed.md",
        "float_layers": {
            row.name: row.reason for row in layers if row.weight_bits is None and "Attention" not in row.kind
        },
        "recipe": recipe.model_dump(mode="json"),
    }


def render(card: dict[str, Any]) -> str:
    """The card as Markdown, the content of `card.md`."""
    rows = [
        f"| {name} | {_number(s.get('J&F'))} | {_number(s.get('J'))} | {_number(s.get('F'))} | {_interval(s)} "
        f"| {_number(s.get('fidelity'))} |"
        for name, s in card["scores"].items()
    ]
    sizes = [f"| {name} | {value:,} |" for name, value in (card["bytes"] or {}).items()]
    kept = [f"- `{name}`: {reason}" for name, reason in card["float_layers"].items()] or ["- none"]
    source = card["source"]
    method, calibration = card["method"], card["calibration"]
    return "\n".join(
        [
            f"# {card['name']}",
            "",
            f"SAM {source['version']} {source['size']} quantized by qsam2 {card['qsam2']}: "
            f"weights {_quantizer(method['weights'])}, activations {_quantizer(method['activations'])}; "
            f"{card['training_steps']} steps of quantization-aware training.",
            "",
            f"- Source checkpoint: {source['checkpoint']}, SHA-256 {source['sha256']}",
            f"- Licence: {card['licence']}",
            f"- Calibration: {calibration['stills']} stills and {calibration['clips']} clips of "
            f"{calibration['frames_a_clip']} frames from {', '.join(calibration['sources'])}, "
            f"seed {calibration['seed']}; fitted: {', '.join(calibration['fitted'])}",
            f"- Evaluation: {card['evaluation']['data']}, {card['evaluation']['protocol']} protocol, "
            f"{card['evaluation']['evaluator']}",
            *([f"- Prompts where the data has no masks: {card['prompts']}"] if "prompts" in card else []),
            f"- Format: {card['format']}",
            "",
            "| model | J&F | J | F | difference to float, 95 % interval | fidelity |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "| format | bytes |",
            "|---|---|",
            *sizes,
            "",
            "Layers with float weights:",
            "",
            *kept,
            "",
        ]
    )


def checkpoint_source(recipe: Recipe) -> dict[str, Any]:
    """Size, version, file and hash of the checkpoint that a recipe starts from."""
    model = recipe.model
    source = {"size": model.size, "version": model.version, "checkpoint": model.checkpoint, "sha256": None}
    if model.checkpoint is not None:
        path = find_checkpoint(model.size, model.version) if model.checkpoint == "auto" else Path(model.checkpoint)
        source |= {"checkpoint": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return source


def _fitted(recipe: Recipe) -> list[str]:
    """Parts fitted by calibration and reconstruction, in order."""
    calibrate, reconstruct = recipe.calibrate, recipe.reconstruct
    return [
        *([f"weights ({calibrate.weights.method})"] if calibrate.weights else []),
        *(["scales of LayerNorms (smoothquant)"] if calibrate.smooth else []),
        "ranges",
        *([f"rounding ({calibrate.rounding.method})"] if calibrate.rounding else []),
        *([f"rounding and activation steps ({reconstruct.method})"] if reconstruct else []),
    ]


def _headline(block: dict[str, Any]) -> dict[str, Any]:
    keys = ("J&F", "J", "F", "fidelity", "box_mIoU", "versus_float", "seconds_per_frame")
    return {key: block[key] for key in keys if key in block}


def _quantizer(spec: dict[str, Any] | None) -> str:
    return "in float" if spec is None else f"at {spec['bits']} bits ({spec['method']})"


def _interval(scores: dict[str, Any]) -> str:
    versus = scores.get("versus_float")
    return "" if versus is None else f"{versus['difference']:+.1f} ({versus['low']:+.1f} to {versus['high']:+.1f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
