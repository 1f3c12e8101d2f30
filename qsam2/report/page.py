"""A run's page, one self-contained HTML file made from the run folder alone, and its table on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qsam2.evaluation.metrics.interval import interval_note, interval_text, paired_difference
from qsam2.evaluation.metrics.scores import amount_text, remarks
from qsam2.output import encodable, read_json, version
from qsam2.recipe import save_recipe
from qsam2.report.draw import (
    draw_clips,
    draw_histograms,
    draw_loss,
    draw_memory,
    draw_noise,
    draw_on_the_way,
    draw_sensitivity,
    draw_worst,
)
from qsam2.report.read import CLIPS, LAYERS, MADE, MEMORY, MODELS, SavedRun

SENSITIVITY = "sensitivity.json"
REPORT = "report.html"


def render(run: SavedRun) -> str:
    """The page as HTML. An unfinished run shows what there is and which stages are to come."""
    layers, memory = run.saved(LAYERS) or {}, run.saved(MEMORY)
    rows = layers.get("layers", [])
    sensitivity = (read_json(run.path / SENSITIVITY) or {}).get("groups")
    scores = score_rows(run.metrics)
    return fill(
        "run.html.j2",
        run=run,
        recipe=run.recipe,
        folder=shlex.quote(run.name),
        python_folder=repr(run.name),
        made=run.saved(MADE),
        scored=scored_on(run),
        left_out=remarks((run.metrics.get("float") or {}).get("left_out", {})),
        verdict=verdict(run, scores),
        recipe_text=save_recipe(run.recipe),
        rows=scores,
        noise=draw_noise(rows),
        worst_layers=draw_worst(rows),
        # the lowest signal to noise of weights first, layers without it last
        layers=sorted(rows, key=lambda row: (row.get("weight_snr_db") is None, row.get("weight_snr_db") or 0.0)),
        sensitivity=draw_sensitivity(sensitivity) if sensitivity else None,
        histograms={what: draw_histograms(layers[what], what) for what in ("weights", "inputs") if layers.get(what)},
        clip_curves=draw_clips(run.curves),
        loss=draw_loss({name: curve for name, curve in run.curves.items() if name == "loss"}),
        on_the_way=_on_the_way(run),
        clips=run.saved(CLIPS),
        media=run.media,
        memory=memory,
        memory_chart=draw_memory(memory) if memory else None,
    )


def _on_the_way(run: SavedRun) -> Markup | None:
    """Chart of the scores during training; None without any."""
    rows = run.metrics.get("on_the_way")
    if not rows:
        return None
    first, result = run.metrics.get("float") or {}, run.metrics.get("quantized") or {}
    steps = sum(stage.trainer.max_steps for stage in run.recipe.training)
    last = {"step": steps, **{key: result[key] for key in ("J&F", "fidelity") if result.get(key) is not None}}
    return draw_on_the_way(rows, first.get("J&F"), last)


def fill(template: str, **values: Any) -> str:
    """A page of a template with its values; all text is escaped."""
    pages = Environment(
        loader=PackageLoader("qsam2.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["interval"] = interval_text
    return encodable(pages.get_template(template).render(version=version(), **values))


def scored_on(run: SavedRun) -> str:
    """Amount and data of the scores: "2 videos, 40 frames, 3 objects of davis:DAVIS:val"."""
    amount = amount_text(run.metrics.get("float") or {}) or "an unknown amount"
    return f"{amount} of {run.recipe.data.scored}"


def verdict(run: SavedRun, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The result of a run, one fact per line: {"what", "value", "more"}. Nothing before the end."""
    last = rows[-1] if rows else {}
    shipped = "float" if run.recipe.quantize is None else "quantized"
    if last.get("model") != shipped:
        return []
    facts = []
    if last["smaller"]:
        more = f"than float32: {last['MB']:.2f} MB instead of {rows[0]['MB']:.2f} MB"
        facts.append({"what": "Size", "value": f"{last['smaller']:.1f}× smaller", "more": more})
    for key, what in (("J&F", "J&F"), ("box_mIoU", "mIoU of boxes")):
        if key in last:
            value, versus = last[key]
            more = versus_text(versus, f"the float model's {rows[0][key][0]:.1f}") if versus else ""
            facts.append({"what": what, "value": f"{value:.1f}", "more": more})
    if last["fidelity"] is not None and shipped != "float":
        more = "mean IoU of its masks with the float model's"
        facts.append({"what": "Fidelity", "value": f"{last['fidelity']:.1f} %", "more": more})
    if run.recipe.train is not None and (versus := run.metrics[shipped].get("versus_ptq")):
        facts.append({"what": "Training", "value": f"{versus['difference']:+.1f}",
                      "more": versus_text(versus, "calibration alone", with_value=False)})  # fmt: skip
    facts.append({"what": "Scored on", "value": "", "more": scored_on(run)})
    return facts


def versus_text(versus: Mapping[str, Any], other: str, *, with_value: bool = True) -> str:
    """A difference to another model in words: "-1.0 (-1.7 to -0.3) to the float model's 93.0: worse"."""
    low, high = versus["low"], versus["high"]
    value = f"{versus['difference']:+.1f} " if with_value else ""
    if low is None:
        return f"{value}against {other}; one video gives no interval"
    finding = "better" if low > 0 else "worse" if high < 0 else "equal" if low == high == 0 else "no sure difference"
    return f"{value}({low:+.1f} to {high:+.1f}) against {other}: {finding}"


def score_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per scored model: scores and their differences to the float model, and bytes.

    "J&F", "J", "F" of data with masks, and "box_mIoU" where stills were scored: (score, difference with its 95 %
    interval or None); "fidelity", and "versus_fidelity", its difference to 100 with the interval, without masks; "MB",
    "smaller" (times), or None.
    """
    float_block, sizes = metrics.get("float"), metrics.get("bytes", {})
    rows = []
    for name in MODELS:
        block = metrics.get(name)
        if block is None or float_block is None:
            continue
        row: dict[str, Any] = {"model": name, "fidelity": block.get("fidelity"), "versus_fidelity": None}
        pair = block["per_object"], float_block["per_object"]
        if block.get("protocol") == "fidelity":
            row["versus_fidelity"] = block.get("versus_float")
        for key in ("J&F", "J", "F"):
            if key in block:
                row[key] = block[key], None if name == "float" else paired_difference(*pair, key=key)
        if "stills" in block and "stills" in float_block:
            boxes = block["stills"]["per_object"], float_block["stills"]["per_object"]
            difference = None if name == "float" else paired_difference(*boxes, key="box_IoU", unit="images")
            row["box_mIoU"] = block["box_mIoU"], difference
        size = sizes.get("float32" if name == "float" else "packed")
        row["MB"] = size and size / 1e6
        row["smaller"] = size and name != "float" and sizes["float32"] / size
        rows.append(row)
    return rows


def results_table(metrics: dict[str, Any]) -> str:
    """Table of a run's models: scores, difference to float with its 95 % interval, fidelity; then mIoU and bytes."""
    blocks = {name: metrics[name] for name in MODELS if name in metrics}
    keys = [key for key in ("J&F", "J", "F") if all(key in block for block in blocks.values())]
    lines = ["  ".join([f"{'':10}", *(f"{key:>5}" for key in keys), f"{'difference to float':>24}", "fidelity"])]
    for name, block in blocks.items():
        difference = interval_text(block["versus_float"]) if "versus_float" in block else ""
        fidelity = f"{block['fidelity']:.1f}" if "fidelity" in block else ""
        scores = (f"{block[key]:5.1f}" for key in keys)
        lines.append("  ".join([f"{name:10}", *scores, f"{difference:>24}", f"{fidelity:>8}"]))
    if prompts := next((block["prompts"] for block in blocks.values() if "prompts" in block), None):
        lines.append(f"prompts: {prompts}; fidelity is the mask IoU with the float model")
    if "versus_ptq" in metrics.get("quantized", {}):
        lines.append(f"quantized against ptq: {interval_text(metrics['quantized']['versus_ptq'])}, 95 % interval")
    if notes := [
        interval_note(block["versus_float"]) for block in blocks.values() if "unit" in block.get("versus_float", {})
    ]:
        lines.append(f"differences: {notes[-1]}")
    if boxes := [f"{name} {metrics[name]['box_mIoU']:.1f}" for name in MODELS if "box_mIoU" in metrics.get(name, {})]:
        lines.append(f"mIoU of masks from a box: {', '.join(boxes)}")
    lines.append("  ".join(f"{name} {value / 1e6:.2f} MB" for name, value in metrics["bytes"].items()))
    return "\n".join(lines)
