"""Scores as plain text for the terminal."""

from __future__ import annotations

from typing import Any

from qsam2.evaluation.scoring import headline
from qsam2.report.read import MODELS


def results_table(metrics: dict[str, Any]) -> str:
    """Table of a run's models: scores, difference to float with its 95 % interval, fidelity; then mIoU and bytes."""
    blocks = {name: metrics[name] for name in MODELS if name in metrics}
    keys = [key for key in ("J&F", "J", "F") if all(key in block for block in blocks.values())]
    lines = ["  ".join([f"{'':10}", *(f"{key:>5}" for key in keys), f"{'difference to float':>24}", "fidelity"])]
    for name, block in blocks.items():
        difference = _interval(block["versus_float"]) if "versus_float" in block else ""
        fidelity = f"{block['fidelity']:.1f}" if "fidelity" in block else ""
        scores = (f"{block[key]:5.1f}" for key in keys)
        lines.append("  ".join([f"{name:10}", *scores, f"{difference:>24}", f"{fidelity:>8}"]))
    if prompts := next((block["prompts"] for block in blocks.values() if "prompts" in block), None):
        lines.append(f"prompts: {prompts}; fidelity is the mask IoU with the float model")
    if "versus_ptq" in metrics.get("quantized", {}):
        lines.append(f"quantized against ptq: {_interval(metrics['quantized']['versus_ptq'])}, 95 % interval")
    if boxes := [f"{name} {metrics[name]['box_mIoU']:.1f}" for name in MODELS if "box_mIoU" in metrics.get(name, {})]:
        lines.append(f"mIoU of masks from a box: {', '.join(boxes)}")
    lines.append("  ".join(f"{name} {value / 1e6:.2f} MB" for name, value in metrics["bytes"].items()))
    return "\n".join(lines)


def _interval(versus: dict[str, float]) -> str:
    return f"{versus['difference']:+.1f} ({versus['low']:+.1f} to {versus['high']:+.1f})"


def score_line(block: dict[str, Any]) -> str:
    """Headline figures of one score block in one line."""
    return f"{block['model']}: {headline(block)}"
