"""The page of a run: one self-contained HTML file without network access, made from the run folder alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qsam2.evaluation.metrics.bootstrap import paired_bootstrap
from qsam2.output import read_json, version, write_text
from qsam2.recipe import save_recipe
from qsam2.recipe.quantizer_specs import QuantizerSpec
from qsam2.report.curves import draw_clips, draw_loss
from qsam2.report.draw import draw_histograms, draw_noise, draw_sensitivity, draw_worst
from qsam2.report.memory_use import draw_memory
from qsam2.report.read import MODELS, SavedRun, read_run

SENSITIVITY = "sensitivity.json"
REPORT = "report.html"


def write_report(folder: Path) -> None:
    """Write a run folder's `report.html`.

    Raises:
        UserError: the folder holds no run, a file of it is damaged, the disk is full.
    """
    write_text(folder / REPORT, render(read_run(folder)))


def render(run: SavedRun) -> str:
    """The page as HTML. An unfinished run shows what there is and which stages are to come."""
    metrics, layers, clips = run.metrics, run.layers, run.clips
    scored = (metrics.get("float") or {}).get("per_object", {})
    sensitivity = read_json(run.path / SENSITIVITY)
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            run=run,
            recipe=run.recipe,
            bits=bits,
            videos=len(scored),
            objects=sum(len(objects) for objects in scored.values()),
            recipe_text=save_recipe(run.recipe),
            version=version(),
            rows=score_rows(metrics),
            missing=run.missing_stages,
            sizes=metrics.get("bytes", {}),
            seconds=metrics.get("seconds", {}),
            noise=_markup(draw_noise(layers["layers"])) if layers else None,
            worst_layers=_markup(draw_worst(layers["layers"])) if layers else None,
            layers=by_noise(layers["layers"]) if layers else [],
            sensitivity=_markup(draw_sensitivity(sensitivity["groups"]))
            if sensitivity and sensitivity["groups"]
            else None,
            histograms=_histograms(layers or {}),
            clip_curves=_markup(draw_clips(run.curves)),
            loss=_markup(draw_loss({name: curve for name, curve in run.curves.items() if name == "loss"})),
            clips=clips,
            media=lambda name: _data_url(name, run.media(name)),
            memory=_markup(draw_memory(run.memory)) if run.memory else None,
            calibrated=metrics.get("calibrated_weights"),
            smoothed=metrics.get("smoothed"),
            rounded=metrics.get("rounded"),
            reconstruction=metrics.get("reconstruction"),
        )
    )


def environment() -> Environment:
    """Jinja environment of the page templates; all text is escaped."""
    return Environment(
        loader=PackageLoader("qsam2.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def score_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per scored model: scores, bytes, seconds per frame, and their differences to the float model.

    "J&F", "J", "F" of data with masks, and "box_mIoU" where stills were scored: (score, difference with its 95 %
    interval or None); "fidelity", and "versus_fidelity", its difference to 100 with the interval, without masks; "MB",
    "seconds": (value, difference or None).
    """
    float_block, sizes = metrics.get("float"), metrics.get("bytes", {})
    rows = []
    for name in MODELS:
        block = metrics.get(name)
        if block is None or float_block is None:
            continue
        row: dict[str, Any] = {"model": name, "fidelity": block.get("fidelity"), "versus_fidelity": None}
        if block.get("protocol") == "fidelity":
            row["versus_fidelity"] = block.get("versus_float")
        for key in ("J&F", "J", "F"):
            if key in block:
                pair = block["per_object"], float_block["per_object"]
                row[key] = block[key], None if name == "float" else paired_bootstrap(*pair, key=key)
        if "stills" in block and "stills" in float_block:
            boxes = block["stills"]["per_object"], float_block["stills"]["per_object"]
            difference = None if name == "float" else paired_bootstrap(*boxes, key="box_IoU")
            row["box_mIoU"] = block["box_mIoU"], difference
        size = sizes.get("float32" if name == "float" else "packed")
        row["MB"] = size and size / 1e6, size and name != "float" and (size - sizes["float32"]) / 1e6
        row["smaller"] = size and name != "float" and sizes["float32"] / size
        seconds, float_seconds = block.get("seconds_per_frame"), float_block.get("seconds_per_frame")
        row["seconds"] = seconds, seconds and float_seconds and name != "float" and seconds - float_seconds
        rows.append(row)
    return rows


def by_noise(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of layers sorted by the weights' signal to noise, lowest first, layers without it last."""
    return sorted(layers, key=lambda row: (row.get("weight_snr_db") is None, row.get("weight_snr_db") or 0.0))


def bits(spec: QuantizerSpec | None) -> str:
    """A quantizer in words, e.g. "at 4 bits (lsq)"."""
    return "in float" if spec is None else f"at {spec.bits} bits ({spec.method})"


def _histograms(layers: Mapping[str, Any]) -> dict[str, Markup]:
    return {what: Markup(draw_histograms(layers[what], what)) for what in ("weights", "inputs") if layers.get(what)}


def _markup(svg: str | None) -> Markup | None:
    return Markup(svg) if svg else None


def _data_url(name: str, data: bytes | None) -> str | None:
    kind = "video/mp4" if name.endswith(".mp4") else "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}" if data else None
