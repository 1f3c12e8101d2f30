"""The weights of calibrated layers before and after, as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from qsam2.calibration.weights import CalibratedLayer

SHOWN = 6
"""How many layers are drawn: those with the heaviest tails before."""
COLUMNS = 3


def draw_histograms(layers: Sequence[CalibratedLayer]) -> str:
    """Histograms of the layers with the heaviest tails as an SVG element; x in standard deviations of before."""
    shown = sorted(layers, key=lambda layer: -layer.max_over_std[0])[:SHOWN]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(9, 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for layer, place in zip(shown, axes, strict=False):
        before, after = layer.histograms
        edges = np.linspace(-1, 1, len(before) + 1) * layer.max_over_std[0]
        place.stairs(before, edges, color="#8c8c8c", fill=True, alpha=0.6, label="before")
        place.stairs(after, edges, color="#0072b2", linewidth=1.5, label="after")
        place.set_title(layer.name.removeprefix("image_encoder.trunk."), fontsize=8)
        place.set_yscale("log")
        place.tick_params(labelsize=7)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes)[len(shown) :]:
        place.set_axis_off()
    figure.supxlabel("weight, in standard deviations of before", fontsize=8)
    figure.supylabel("share of the weights", fontsize=8)
    figure.axes[0].legend(frameon=False, fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    label = f"Histograms of the weights of {len(shown)} layers before and after calibration, logarithmic"
    return f'<svg role="img" aria-label="{label}" ' + svg[svg.index("<svg") + len("<svg ") :]
