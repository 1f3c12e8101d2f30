"""Accuracy against bytes or time, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qsam2.report.svg import BLUE, GREY, ORANGE, inline, new_figure


@dataclass(frozen=True)
class Point:
    """A scored model: its cost (less is better), its score in percent, whether it is a float model."""

    label: str
    cost: float
    score: float
    is_float: bool = False


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in one of cost and score without losing in the other, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def draw_pareto(points: Sequence[Point], cost: str) -> str:
    """The points with their labels and the front as an SVG element; `cost` names the axis with its unit."""
    front = pareto_front(points)
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for is_float, colour, marker, label in ((False, BLUE, "o", "quantized"), (True, ORANGE, "s", "float")):
        group = [point for point in points if point.is_float == is_float]
        if group:
            at = [point.cost for point in group], [point.score for point in group]
            axes.scatter(*at, color=colour, marker=marker, s=40, label=label, zorder=3)
    steps = [(point.cost, point.score) for point in front]
    axes.plot(*zip(*steps, strict=True), color=GREY, linestyle="--", drawstyle="steps-post", label="Pareto front")
    for point in points:
        axes.annotate(point.label, (point.cost, point.score), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel=cost, ylabel="J&F")
    axes.legend(frameon=False, fontsize=8)
    named = ", ".join(f"{point.label} {point.score:.1f} at {point.cost:.3g}" for point in front)
    return inline(figure, f"J&F against {cost} of {len(points)} models; Pareto front: {named}")
