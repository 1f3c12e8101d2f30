"""A run's curves: read from what training logged, and drawn."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SMOOTHING = 20
"""Logged values that the drawn mean is taken over."""


def read_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a logged figure, by step; of steps that a resumed run repeated, the later values."""
    values: dict[int, float] = {}
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in versions:
        with path.open(newline="") as file:
            values |= {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
    return sorted(values.items())


def draw_loss(curve: list[tuple[int, float]]) -> str | None:
    """The loss over the steps as an SVG element, dark on nothing; None where nothing was logged."""
    if len(curve) < 2:
        return None
    steps, losses = np.array(curve).T
    width = min(SMOOTHING, len(losses))
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#8c8c8c", linewidth=0.6, label="logged steps")
    axes.plot(steps[width - 1 :], mean, color="#0072b2", linewidth=2, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, 1.1 * float(np.quantile(losses, 0.98))))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    label = f"Loss over {len(curve)} logged steps, from {mean[0]:.2f} to {mean[-1]:.2f}"
    return f'<svg role="img" aria-label="{label}" ' + svg[svg.index("<svg") + len("<svg ") :]
