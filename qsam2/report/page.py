"""The page of a run: one self-contained HTML file, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

import qsam2
from qsam2.calibration.weights import CalibratedLayer
from qsam2.layers.convert import ConvertedLayer
from qsam2.recipe import Recipe, save_recipe
from qsam2.recipe.quantizers import QuantizerSpec
from qsam2.report.curves import draw_loss, read_curve
from qsam2.report.histograms import draw_histograms
from qsam2.run_folder import RunFolder, write_text
from qsam2.tasks.trainer import CURVES

MODELS = ("float", "ptq", "quantized")


def write_report(
    folder: RunFolder,
    recipe: Recipe,
    layers: Sequence[ConvertedLayer],
    pictures: Sequence[Image.Image],
    calibrated: Sequence[CalibratedLayer] = (),
) -> None:
    """Write `report.html`: scores, sizes, times, layers, calibrated weights, tracked frames and the recipe."""
    curve = draw_loss(read_curve(folder.path / CURVES, "loss"))
    write_text(folder.report, render(folder.metrics, recipe, layers, pictures, curve, calibrated))


def render(
    metrics: dict[str, Any],
    recipe: Recipe,
    layers: Sequence[ConvertedLayer],
    pictures: Sequence[Image.Image],
    curve: str | None = None,
    calibrated: Sequence[CalibratedLayer] = (),
) -> str:
    """The page as HTML; `curve` is the loss over training as SVG."""
    template = Environment(loader=PackageLoader("qsam2.report"), autoescape=True).get_template("run.html.j2")
    scored = metrics["float"]["per_object"].values()
    return template.render(
        recipe=recipe,
        bits=_bits,
        data=recipe.data.scored,
        videos=len(scored),
        objects=sum(len(objects) for objects in scored),
        recipe_text=save_recipe(recipe),
        version=qsam2.__version__,
        scores={name: metrics[name] for name in MODELS if name in metrics},
        sizes=metrics.get("bytes", {}),
        seconds=metrics["seconds"],
        layers=layers,
        calibrated=calibrated,
        smoothed=metrics.get("smoothed"),
        rounded=metrics.get("rounded"),
        reconstruction=metrics.get("reconstruction"),
        histograms=Markup(draw_histograms(calibrated)) if calibrated else None,
        curve=Markup(curve) if curve else None,
        pictures=[_data_url(picture) for picture in pictures],
    )


def _bits(spec: QuantizerSpec | None) -> str:
    return "in float" if spec is None else f"at {spec.bits} bits ({spec.method})"


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
