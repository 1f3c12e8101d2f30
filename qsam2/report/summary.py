"""Scores as text."""

from __future__ import annotations

from typing import Any

MODELS = ("float", "ptq", "quantized")


def results_table(metrics: dict[str, Any]) -> str:
    """A run's models, one row each: J&F, its difference to float with the interval, fidelity; then mIoU and bytes."""
    lines = [f"{'':10}  {'J&F':>5}  {'J':>5}  {'F':>5}  {'difference to float':>24}  {'fidelity':>8}"]
    for name in MODELS:
        if name not in metrics:
            continue
        block = metrics[name]
        difference = _interval(block["versus_float"]) if "versus_float" in block else ""
        fidelity = f"{block['fidelity']:.1f}" if "fidelity" in block else ""
        lines.append(
            f"{name:10}  {block['J&F']:5.1f}  {block['J']:5.1f}  {block['F']:5.1f}  {difference:>24}  {fidelity:>8}"
        )
    if "versus_ptq" in metrics.get("quantized", {}):
        lines.append(f"quantized against ptq: {_interval(metrics['quantized']['versus_ptq'])}, 95 % interval")
    if boxes := [f"{name} {metrics[name]['box_mIoU']:.1f}" for name in MODELS if "box_mIoU" in metrics.get(name, {})]:
        lines.append(f"mIoU of masks from a box: {', '.join(boxes)}")
    lines.append("  ".join(f"{name} {value / 1e6:.2f} MB" for name, value in metrics["bytes"].items()))
    return "\n".join(lines)


def _interval(versus: dict[str, float]) -> str:
    return f"{versus['difference']:+.1f} ({versus['low']:+.1f} to {versus['high']:+.1f})"


def score_line(block: dict[str, Any]) -> str:
    """The headline figures of one score block."""
    keys = [key for key in ("J&F", "J", "F", "fidelity", "point_mIoU", "box_mIoU") if block.get(key) is not None]
    return f"{block['model']}: " + ", ".join(f"{key} {block[key]:.1f}" for key in keys)
