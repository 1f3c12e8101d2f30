"""Weights and inputs of the layers that lose most, before and after, with the grid that quantizes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qsam2.report.svg import BLUE, GREEN, GREY, inline, new_figure

COLUMNS = 2
TITLE = 48
"""Letters that fit above one of them."""
DRAWN_LEVELS = 32
"""With more levels only the ends of the grid are drawn."""

SMALLEST = 5e-7
"""Share at which the axis begins: what is kept is rounded to 1e-6."""


def draw_histograms(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """Histograms as `measure_layers` keeps them, of weights or inputs (`what`), as an SVG element."""
    down = -(-len(rows) // COLUMNS)
    figure = new_figure(8, 2.1 * down + 0.5)
    places = figure.subplots(down, COLUMNS, squeeze=False).flat
    for row, axes in zip(rows, places, strict=False):
        first, last = row["levels"]
        edges = _edges(row)
        drawn = range(first, last + 1) if last - first < DRAWN_LEVELS else (first, last)
        axes.stairs(row["before"], edges, color=GREY, fill=True, alpha=0.6, label="float model")
        axes.stairs(row["after"], edges, color=BLUE, linewidth=1.5, label="before rounding" if what == "weights"
                    else "quantized model")  # fmt: skip
        for level in drawn:
            axes.axvline(level, color=GREEN, linewidth=0.8, linestyle=":", label="grid" if level == first else None)
        axes.set_title(_wrapped(f"{_short(row['layer'])}, {row['bits']} bits"), fontsize=8)
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set(xlim=row["reach"], ylim=(SMALLEST, 1))
        axes.tick_params(labelsize=7)
    for axes in list(places):
        axes.set_axis_off()
    figure.supxlabel(f"{what}, in steps of the grid", fontsize=8)
    figure.supylabel(f"share of the {what}", fontsize=8)
    figure.axes[0].legend(frameon=False, fontsize=7)
    beyond = [f"{_short(row['layer'])} {_beyond(row):.2%}" for row in rows]
    return inline(figure, f"Histograms of the {what} of {len(rows)} layers, float and quantized, on their grids; "
                          f"shares beyond the grid: {', '.join(beyond)}")  # fmt: skip


def _beyond(row: Mapping[str, Any]) -> float:
    edges = _edges(row)
    outside = (edges[1:] <= row["levels"][0] - 0.5) | (edges[:-1] >= row["levels"][1] + 0.5)
    return float(np.array(row["after"])[outside].sum())


def _edges(row: Mapping[str, Any]) -> np.ndarray:
    low, high = row["reach"]
    return np.linspace(low, high, len(row["after"]) + 1)


def _wrapped(title: str) -> str:
    """A title that is wider than its drawing goes on in a second line, behind a dot in its middle."""
    if len(title) <= TITLE:
        return title
    dots = [index for index, letter in enumerate(title) if letter == "."]
    cut = min(dots, key=lambda index: abs(index - len(title) / 2), default=TITLE) + 1
    return f"{title[:cut]}\n{title[cut:]}"


def _short(name: str) -> str:
    return name.removeprefix("image_encoder.trunk.").removeprefix("sam_")
