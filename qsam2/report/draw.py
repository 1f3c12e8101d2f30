"""Figures of a report as inline SVG.

Each `draw_*` makes a matplotlib figure and returns it as an `<svg role="img">` element whose label says in words what
the figure shows. Colours are CSS variables, so that a figure follows the page's light or dark mode.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from qsam2.output import encodable
from qsam2.train.loggers import SCALE

# Okabe and Ito's colours, which colour-blind people can tell apart; the page has lighter ones for dark mode.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c8c8c"
VARIABLES = {BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", GREY: "grey"}
SERIES = tuple(
    {"color": colour, "linestyle": dashes, "marker": marker}
    for colour, dashes, marker in ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"))
)
"""Styles of series: colour, dashes and marker differ together, so that they work in black and white, too."""
WORST = 12
"""Number of layers that `draw_worst` names."""
PARTS = {
    "image_encoder": (BLUE, "o"),
    "memory_attention": (ORANGE, "s"),
    "memory_encoder": (GREEN, "^"),
    "sam_mask_decoder": (PURPLE, "D"),
    "other": (GREY, "x"),
}
"""Colour and marker of each part of SAM2."""
COLUMNS = 2
"""Histograms side by side."""
TITLE = 48
"""Letters that fit above a histogram."""
DRAWN_LEVELS = 32
"""Grids with more levels are drawn as their two ends."""
SMALLEST = 5e-7
"""Lower end of the share axis: stored shares are rounded to 1e-6."""
SMOOTHING = 20
"""Largest window of the moving average, in logged values; short runs use a fifth of all values."""
LABEL_PT = (4, -10, 14, -20, 24, -30, 34, -40)
"""Vertical offsets of a label from its point, in points, in the order in which they are tried."""
MOVED = 4
"""Number of quantizers with a line of their own: those whose step size changed most."""
READINGS = {
    "own keys": (BLUE, "o", 22),
    "shared keys": (ORANGE, "s", 22),
    "part of its keys": (ORANGE, "^", 22),
    "not read": (GREY, "x", 16),
}
"""Colour, marker and size of each way in which `memory_use` finds a remembered frame read."""

Curve = list[tuple[int, float]]
"""(step, value) pairs by ascending step."""


def new_figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of a size in inches, and its axes: one, or those of a `grid` as `Figure.subplots` takes it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def inline(figure: Figure, label: str) -> Markup:
    """A figure as an `<svg role="img">` element labelled `label`; black becomes the colour of the surrounding text.

    Text is shown as it is: a name with dollar signs is no formula.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    for words in figure.findobj(Text):
        words.set(parse_math=False, text=encodable(words.get_text()))
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'style="[^"]*"', _with_variables, svg[svg.index("<svg") + len("<svg ") :])
    prefix = re.sub(r"\W+", "-", label)[:40]  # makes ids unique within the page; those that nothing refers to go
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {svg}')


def _with_variables(style: re.Match[str]) -> str:
    text = style[0].replace("#000000", "currentColor")
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return text


def draw_noise(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Signal to noise of the weights of all layers in dB, sorted; None if no weight is quantized."""
    measured = sorted((row for row in rows if row.get("weight_snr_db") is not None), key=lambda r: r["weight_snr_db"])
    if not measured:
        return None
    figure, axes = new_figure(8, 3.2)
    values = [row["weight_snr_db"] for row in measured]
    parts = [row["name"].split(".")[0] for row in measured]
    for name, (colour, marker) in PARTS.items():
        at = [index for index, part in enumerate(parts) if (part if part in PARTS else "other") == name]
        if at:
            label = name.replace("_", " ").removeprefix("sam ")
            axes.scatter(at, [values[index] for index in at], s=14, color=colour, marker=marker, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layers, the noisiest first", ylabel="weights, signal to noise (dB)")
    axes.legend(frameon=False, fontsize=8)
    summary = (
        f"Signal to noise of the weights of {len(values)} layers: from {values[0]:.1f} dB ({measured[0]['name']}) to "
        f"{values[-1]:.1f} dB, {np.median(values):.1f} dB in the median"
    )
    return inline(figure, summary)


def draw_worst(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The `WORST` layers of lowest signal to noise in weights or inputs, by name; None if nothing is quantized."""
    worst = sorted((row for row in rows if _lowest(row) is not None), key=lambda row: _lowest(row) or 0.0)[:WORST]
    if not worst:
        return None
    figure, axes = new_figure(8, 0.28 * len(worst) + 1.2)
    for role, colour, marker in (("weight", BLUE, "o"), ("input", ORANGE, "s")):
        snr = [row.get(f"{role}_snr_db") for row in worst]
        points = [(value, place) for place, value in enumerate(snr) if value is not None]
        if points:
            values, places = zip(*points, strict=True)
            axes.scatter(values, places, color=colour, marker=marker, s=30, label=f"{role}s")
    labels = [f"{_short(row['name'])}  {row['weight_bits'] or '-'}/{row['activation_bits'] or '-'}" for row in worst]
    _name_rows(axes, labels, "signal to noise (dB)")
    named = ", ".join(f"{row['name']} {_lowest(row):.1f} dB" for row in worst[:3])
    return inline(figure, f"The {len(worst)} noisiest layers, the lower of weights and inputs; first {named}")


def draw_sensitivity(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Fidelity lost by quantizing one group of layers alone (`qsam2 sensitivity`), most sensitive groups first."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["group"]] = max(worst.get(row["group"], 0.0), row["loss"])
    groups = sorted(worst, key=lambda group: -worst[group])
    figure, axes = new_figure(8, 0.24 * len(groups) + 1)
    series = list(dict.fromkeys((row["part"], row["bits"]) for row in rows))
    for (part, bits), style in zip(series, itertools.cycle(SERIES), strict=False):
        of_series = [row for row in rows if (row["part"], row["bits"]) == (part, bits)]
        losses, places = [row["loss"] for row in of_series], [groups.index(row["group"]) for row in of_series]
        axes.scatter(losses, places, color=style["color"], marker=style["marker"], s=24, label=f"{part} at {bits} bits")
    _name_rows(axes, groups, "loss of fidelity (percent of mask IoU)")
    named = ", ".join(f"{group} {worst[group]:.1f}" for group in groups[:3])
    return inline(figure, f"Fidelity lost by quantizing each of {len(groups)} groups alone, at worst; most by {named}")


def _name_rows(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    """One name per row, the first on top; the legend goes above."""
    axes.set_yticks(range(len(names)), list(map(encodable, names)), fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", color=GREY, linewidth=0.4, alpha=0.5)
    axes.set_xlabel(xlabel)
    axes.figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper right")


def _lowest(row: Mapping[str, Any]) -> float | None:
    return min((row[key] for key in ("weight_snr_db", "input_snr_db") if row.get(key) is not None), default=None)


def _short(name: str) -> str:
    return name.removeprefix("image_encoder.trunk.").removeprefix("sam_")


def draw_histograms(rows: Sequence[Mapping[str, Any]], what: str) -> Markup:
    """Histograms that `measure_layers` returns, of "weights" or "inputs" (`what`)."""
    down = -(-len(rows) // COLUMNS)
    figure, grid = new_figure(8, 2.1 * down + 0.5, nrows=down, ncols=COLUMNS, squeeze=False)
    places = grid.flat
    beyond = []
    for row, axes in zip(rows, places, strict=False):
        (first, last), (lowest, highest) = row["levels"], row["reach"]
        edges = np.linspace(lowest, highest, len(row["after"]) + 1)
        outside = (edges[1:] <= first - 0.5) | (edges[:-1] >= last + 0.5)
        beyond.append(f"{_short(row['layer'])} {np.array(row['after'])[outside].sum():.2%}")
        drawn = range(first, last + 1) if last - first < DRAWN_LEVELS else (first, last)
        axes.stairs(row["before"], edges, color=GREY, fill=True, alpha=0.6, label="float model")
        axes.stairs(row["after"], edges, color=BLUE, linewidth=1.5, label="before rounding" if what == "weights"
                    else "quantized model")  # fmt: skip
        for level in drawn:
            axes.axvline(level, color=GREEN, linewidth=0.8, linestyle=":", label="grid" if level == first else None)
        axes.set_title(_wrapped(f"{_short(row['layer'])}, {row['bits']} bits"), fontsize=8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default is a formula
        axes.minorticks_off()
        axes.set(xlim=row["reach"], ylim=(SMALLEST, 1))
        axes.tick_params(labelsize=7)
    for axes in list(places):
        axes.set_axis_off()
    figure.supxlabel(f"{what}, in steps of the grid", fontsize=8)
    figure.supylabel(f"share of the {what}", fontsize=8)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return inline(figure, f"Histograms of the {what} of {len(rows)} layers, float and quantized, on their grids; "
                          f"shares beyond the grid: {', '.join(beyond)}")  # fmt: skip


def _wrapped(title: str) -> str:
    """Break a title wider than its histogram behind the dot nearest to its middle."""
    if len(title) <= TITLE:
        return title
    dots = [index for index, letter in enumerate(title) if letter == "."]
    cut = min(dots, key=lambda index: abs(index - len(title) / 2), default=TITLE) + 1
    return f"{title[:cut]}\n{title[cut:]}"


@dataclass(frozen=True)
class Point:
    """A scored model: cost (less is better) and score in percent (more is better)."""

    label: str
    cost: float
    score: float
    is_float: bool = False


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point dominates (as cheap and better, or cheaper and as good), by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def draw_pareto(points: Sequence[Point], cost: str) -> Markup:
    """Labelled points and their Pareto front; `cost` names the x axis with its unit."""
    front = pareto_front(points)
    figure, axes = new_figure(8, 3.6)
    for is_float, colour, marker, label in ((False, BLUE, "o", "quantized"), (True, ORANGE, "s", "float")):
        group = [point for point in points if point.is_float == is_float]
        if group:
            at = [point.cost for point in group], [point.score for point in group]
            axes.scatter(*at, color=colour, marker=marker, s=40, label=label, zorder=3)
    steps = [(point.cost, point.score) for point in front]
    axes.plot(*zip(*steps, strict=True), color=GREY, linestyle="--", drawstyle="steps-post", label="Pareto front")
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel=cost, ylabel="J&F")
    axes.legend(frameon=False, fontsize=8)
    _label(axes, points)
    named = ", ".join(f"{point.label} {point.score:.1f} at {point.cost:.3g}" for point in front)
    return inline(figure, f"J&F against {cost} of {len(points)} models; Pareto front: {named}")


def _label(axes: Axes, points: Sequence[Point]) -> list[Text]:
    """Write each point's label beside it, on the nearest of `LABEL_PT` where it covers no earlier label."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()  # places the axes, so that the extents of texts are known
    labels: list[Text] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        taken = [label.get_window_extent().padded(2) for label in labels]
        free = None
        for offset in LABEL_PT:
            at: dict[str, Any] = {
                "xytext": (5, offset),
                "textcoords": "offset points",
                "fontsize": 8,
                "parse_math": False,
            }
            label = axes.annotate(encodable(point.label), (point.cost, point.score), **at)
            if not any(label.get_window_extent().overlaps(box) for box in taken):
                free = label
                break
            label.remove()
        labels.append(free or axes.annotate(encodable(point.label), (point.cost, point.score), **at))
    return labels


def draw_loss(curves: Mapping[str, Curve]) -> Markup | None:
    """Loss of one or several runs over the steps, as SVG; None if nothing was logged."""
    shown = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not shown:
        return None
    figure, axes = new_figure(8, 3)
    tops, parts, alone, lines = [], [], len(shown) == 1, {}
    for (name, curve), style in zip(shown.items(), itertools.cycle(SERIES), strict=False):
        steps, losses = np.array(curve).T
        width = min(SMOOTHING, max(len(losses) // 5, 1))
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        parts.append(
            f"{'' if alone else name + ': '}from {mean[0]:.2f} to {mean[-1]:.2f} over {len(curve)} logged steps"
        )
        if alone:
            name = f"mean of {width}" if width > 1 else "logged steps"
        if alone and width > 1:
            lines["logged steps"], *_ = axes.plot(steps, losses, color=GREY, linewidth=0.6)
        line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 2}
        lines[name], *_ = axes.plot(steps[width - 1 :], mean, **line)
        tops.append(float(np.quantile(losses, 0.98)))
    axes.set(xlabel="step", ylabel="loss", ylim=(0, 1.1 * max(tops)))
    axes.legend(list(lines.values()), list(lines), frameon=False)  # labels of their own could not begin with _
    return inline(figure, "Loss " + "; ".join(parts))


def draw_on_the_way(
    rows: Sequence[Mapping[str, float]], float_score: float | None, last: Mapping[str, float]
) -> Markup:
    """Scores during training over its steps, and the float model's J&F; `last` are those of the result."""
    figure, axes = new_figure(8, 3)
    parts = []
    for key, colour, dashes, marker in (("J&F", BLUE, "-", "o"), ("fidelity", ORANGE, "--", "s")):
        curve = [(row["step"], row[key]) for row in (*rows, last) if key in row]
        if curve:
            line = {"color": colour, "linestyle": dashes, "marker": marker}
            axes.plot(*zip(*curve, strict=True), label=key, markersize=4, **line)
            parts.append(f"{key} from {curve[0][1]:.1f} at step {curve[0][0]} to {curve[-1][1]:.1f} at {curve[-1][0]}")
    if float_score is not None:
        axes.axhline(float_score, color=GREY, linestyle=":", label="J&F of the float model")
    axes.set(xlabel="step", ylabel="score")
    axes.legend(frameon=False, fontsize=8)
    return inline(figure, "; ".join(parts))


def draw_clips(curves: Mapping[str, Curve]) -> Markup | None:
    """Learned step sizes (None without any) as multiples of their first values: the middle 80 %, `MOVED` extremes."""
    relative = _relative(curves)
    if not relative:
        return None
    figure, axes = new_figure(8, 3.6)
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
    for index, (name, curve) in enumerate(moved_most(curves).items()):
        steps, moved = np.array(curve).T
        axes.plot(steps, moved, color=GREY, linewidth=0.8)
        if index == 0:  # further names would lie on one another
            axes.annotate(name.removesuffix("_quantizer"), (steps[-1], moved[-1]), fontsize=8, ha="right", va="bottom")
    axes.set(xlabel="step", ylabel="step size / its first")
    axes.legend(frameon=False, loc="best")
    return inline(figure, "Learned clips: " + "; ".join(parts))


def moved_most(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The `MOVED` step sizes that changed most, by quantizer, as multiples of their first values."""
    relative = _relative(curves)
    names = sorted(relative, key=lambda name: -abs(np.log(max(relative[name][-1][1], 1e-9))))[:MOVED]
    return {name: relative[name] for name in names}


def _relative(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Logged step sizes as multiples of their first values, by quantizer."""
    scales = {name.removeprefix(SCALE): curve for name, curve in curves.items() if name.startswith(SCALE)}
    return {
        name: [(step, value / curve[0][1]) for step, value in curve]
        for name, curve in scales.items()
        if len(curve) > 1 and curve[0][1] > 0
    }


def draw_memory(used: Mapping[str, Any]) -> Markup:
    """Age of the remembered frames and number of keys read, over the frames of the video, as SVG."""
    rows = used["frames"]
    figure, (upper, lower) = new_figure(8, 4, nrows=2, sharex=True, height_ratios=(3, 1))
    for reading, (colour, marker, size) in READINGS.items():
        at = [(row["frame"], row["frame"] - int(time)) for row in rows for time, kind in row["read"].items()
              if kind == reading]  # fmt: skip
        if at:
            upper.scatter(*zip(*at, strict=True), color=colour, marker=marker, s=size, label=reading, linewidths=0.8)
    upper.set_ylabel("age of the remembered frame")
    upper.legend(frameon=False, fontsize=8, loc="upper left", ncols=4, bbox_to_anchor=(0, 1.16))
    frames = [row["frame"] for row in rows]
    lower.step(frames, [row["of"] for row in rows], color=GREY, linestyle="--", where="mid", label="all")
    lower.step(frames, [row["key_frames"] for row in rows], color=BLUE, where="mid", label="read")
    lower.set(xlabel="frame", ylabel="frames of keys", ylim=(0, None))
    lower.legend(frameon=False, fontsize=8, loc="lower right")
    read, whole = sum(row["key_frames"] for row in rows), sum(row["of"] for row in rows)
    count = {name: sum(kind == name for row in rows for kind in row["read"].values()) for name in READINGS}
    named = ", ".join(f"{value} {name}" for name, value in count.items() if value)
    return inline(figure, f"Memory of {len(rows)} tracked frames: {read:.0f} of {whole} frames of keys were read; "
                          f"remembered frames: {named}")  # fmt: skip
