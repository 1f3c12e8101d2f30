"""Where the loss is: signal to noise of the layers, and what quantizing a group alone costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qsam2.report.svg import BLUE, GREEN, GREY, ORANGE, PURPLE, SERIES, inline, new_figure

WORST = 12
PARTS = {
    "image_encoder": (BLUE, "o"),
    "memory_attention": (ORANGE, "s"),
    "memory_encoder": (GREEN, "^"),
    "sam_mask_decoder": (PURPLE, "D"),
    "other": (GREY, "x"),
}


def draw_noise(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """All layers in the order of their weights' signal to noise in dB; None where no weight is quantized."""
    measured = sorted((row for row in rows if row.get("weight_snr_db") is not None), key=lambda r: r["weight_snr_db"])
    if not measured:
        return None
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    part = [row["name"].split(".")[0] for row in measured]
    part = [name if name in PARTS else "other" for name in part]
    for name, (colour, marker) in PARTS.items():
        at = [index for index, own in enumerate(part) if own == name]
        if at:
            values = [measured[index]["weight_snr_db"] for index in at]
            axes.scatter(
                at, values, s=14, color=colour, marker=marker, label=name.replace("_", " ").removeprefix("sam ")
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layers, the noisiest first", ylabel="weights, signal to noise (dB)")
    axes.legend(frameon=False, fontsize=8)
    values = [row["weight_snr_db"] for row in measured]
    label = (
        f"Signal to noise of the weights of {len(values)} layers: from {values[0]:.1f} dB ({measured[0]['name']}) to "
        f"{values[-1]:.1f} dB, {np.median(values):.1f} dB in the median"
    )
    return inline(figure, label)


def draw_worst(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The layers whose weights or inputs are noisiest, by name; None where nothing is quantized."""
    worst = sorted((row for row in rows if _lowest(row) is not None), key=lambda row: _lowest(row) or 0.0)[:WORST]
    if not worst:
        return None
    figure = new_figure(8, 0.28 * len(worst) + 1.2)
    axes = figure.subplots()
    for key, label, colour, marker in (
        ("weight_snr_db", "weights", BLUE, "o"),
        ("input_snr_db", "inputs", ORANGE, "s"),
    ):
        found = [(row[key], place) for place, row in enumerate(worst) if row.get(key) is not None]
        if found:
            values, places = zip(*found, strict=True)
            axes.scatter(values, places, color=colour, marker=marker, s=30, label=label)
    _name_rows(axes, [_label(row) for row in worst], "signal to noise (dB)")
    named = ", ".join(f"{row['name']} {_lowest(row):.1f} dB" for row in worst[:3])
    return inline(figure, f"The {len(worst)} noisiest layers, the lower of weights and inputs; first {named}")


def draw_sensitivity(rows: Sequence[Mapping[str, Any]]) -> str:
    """What quantizing one group alone loses, as `qsam2 sensitivity` measures it: the most sensitive groups first."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["group"]] = max(worst.get(row["group"], 0.0), row["loss"])
    groups = sorted(worst, key=lambda group: -worst[group])
    figure = new_figure(8, 0.24 * len(groups) + 1)
    axes = figure.subplots()
    series = list(dict.fromkeys((row["part"], row["bits"]) for row in rows))
    for index, (part, bits) in enumerate(series):
        style = SERIES[index % len(SERIES)]
        found = [
            (row["loss"], groups.index(row["group"])) for row in rows if (row["part"], row["bits"]) == (part, bits)
        ]
        losses, places = zip(*found, strict=True)
        axes.scatter(losses, places, color=style["color"], marker=style["marker"], s=24, label=f"{part} at {bits} bits")
    _name_rows(axes, groups, "loss of fidelity (percent of mask IoU)")
    named = ", ".join(f"{group} {worst[group]:.1f}" for group in groups[:3])
    return inline(figure, f"Fidelity lost by quantizing each of {len(groups)} groups alone, at worst; most by {named}")


def _name_rows(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    """A name a row, the first on top, and the legend above."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", color=GREY, linewidth=0.4, alpha=0.5)
    axes.set_xlabel(xlabel)
    axes.figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper right")


def _lowest(row: Mapping[str, Any]) -> float | None:
    found = [row[key] for key in ("weight_snr_db", "input_snr_db") if row.get(key) is not None]
    return min(found) if found else None


def _label(row: Mapping[str, Any]) -> str:
    bits = f"{row['weight_bits'] or '-'}/{row['activation_bits'] or '-'}"
    return f"{row['name'].removeprefix('image_encoder.trunk.').removeprefix('sam_')}  {bits}"
