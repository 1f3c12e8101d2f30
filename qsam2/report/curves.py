"""Training curves: read from the CSV files that training logs, and drawn."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsam2.errors import UserError
from qsam2.report.draw import BLUE, GREY, ORANGE, SERIES, inline, new_figure

SMOOTHING = 20
"""Largest window of the moving average, in logged values; short runs use a fifth of all values."""
MOVED = 4
"""Number of quantizers with a line of their own: those whose step size changed most."""
SCALE = "scale/"

Curve = list[tuple[int, float]]
"""(step, value) pairs by ascending step."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """All logged figures; where a resumed run repeated steps, the later values count.

    Raises:
        UserError: a file is damaged.
    """
    values: dict[str, dict[int, float]] = {}
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in versions:
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    step = int(row["step"])
                    for name, text in row.items():
                        if text and name != "step":
                            values.setdefault(name, {})[step] = float(text)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, the report does without") from error
    return {name: sorted(by_step.items()) for name, by_step in values.items()}


def draw_loss(curves: Mapping[str, Curve]) -> str | None:
    """Loss of one or several runs over the steps, as SVG; None if nothing was logged."""
    shown = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not shown:
        return None
    figure = new_figure(8, 3)
    axes = figure.subplots()
    tops, parts = [], []
    for (name, curve), style in zip(shown.items(), _styles(len(shown)), strict=True):
        steps, losses = np.array(curve).T
        width = min(SMOOTHING, max(len(losses) // 5, 1))
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        if len(shown) == 1:
            name = f"mean of {width}" if width > 1 else "logged steps"
        if len(shown) == 1 and width > 1:
            axes.plot(steps, losses, color=GREY, linewidth=0.6, label="logged steps")
        axes.plot(steps[width - 1 :], mean, **style, linewidth=2, label=name)
        tops.append(float(np.quantile(losses, 0.98)))
        parts.append(f"from {mean[0]:.2f} to {mean[-1]:.2f} over {len(curve)} logged steps")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, 1.1 * max(tops)))
    axes.legend(frameon=False)
    names = [f"{name}: " if len(shown) > 1 else "" for name in shown]
    return inline(figure, "Loss " + "; ".join(name + part for name, part in zip(names, parts, strict=True)))


def draw_clips(curves: Mapping[str, Curve]) -> str | None:
    """Learned step sizes over training, as multiples of their first values: the middle 80 % and the `MOVED` extremes.

    None if no step size was learned or logged.
    """
    scales = {name.removeprefix(SCALE): curve for name, curve in curves.items() if name.startswith(SCALE)}
    scales = {name: curve for name, curve in scales.items() if len(curve) > 1 and curve[0][1] > 0}
    if not scales:
        return None
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    relative = {name: [(step, value / curve[0][1]) for step, value in curve] for name, curve in scales.items()}
    parts = []
    for role, colour, dashes, hatch in (("weight", BLUE, "-", "//"), ("input", ORANGE, "--", "\\\\")):
        group = [np.array(c) for name, c in relative.items() if ("weight_quantizer" in name) == (role == "weight")]
        length = min(map(len, group), default=0)
        if not length:
            continue
        values = np.stack([curve[:length, 1] for curve in group])
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
        steps = group[0][:length, 0]
        axes.fill_between(steps, low, high, facecolor=colour, edgecolor=colour, alpha=0.25, linewidth=0, hatch=hatch)
        axes.plot(steps, middle, color=colour, linestyle=dashes, linewidth=2, label=f"{role}s, median of {len(group)}")
        parts.append(f"{len(group)} of {role}s end at {middle[-1]:.2f} times their start in the median "
                     f"({low[-1]:.2f} to {high[-1]:.2f} for 80 %)")  # fmt: skip
    farthest = sorted(relative, key=lambda name: -abs(np.log(max(relative[name][-1][1], 1e-9))))[:MOVED]
    for index, name in enumerate(farthest):
        steps, moved = np.array(relative[name]).T
        axes.plot(steps, moved, color=GREY, linewidth=0.8)
        if index == 0:  # further names would lie on one another
            axes.annotate(name.removesuffix("_quantizer"), (steps[-1], moved[-1]), fontsize=8, ha="right", va="bottom")
    axes.set(xlabel="step", ylabel="step size / its first")
    axes.legend(frameon=False, loc="best")
    return inline(figure, "Learned clips: " + "; ".join(parts))


def _styles(count: int) -> list[dict[str, Any]]:
    return [{key: style[key] for key in ("color", "linestyle")}
            for style in (SERIES[index % len(SERIES)] for index in range(count))]  # fmt: skip
