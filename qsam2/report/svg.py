"""Figures as SVG elements of a page: text in its font and colour, lines in colours that follow light and dark."""

from __future__ import annotations

import io
import re
from html import escape

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; the page gives each a lighter twin in the dark.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c8c8c"
VARIABLES = {BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", GREY: "grey"}
SERIES = tuple(
    {"color": colour, "linestyle": dashes, "marker": marker}
    for colour, dashes, marker in ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"))
)
"""Colour, dashes and marker together: told apart in black and white, too."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def inline(figure: Figure, label: str) -> str:
    """A figure as an `<svg role="img">` element that says `label`; black becomes the colour of the text around it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") + len("<svg ") :].replace("#000000", "currentColor")
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return f'<svg role="img" aria-label="{escape(label)}" {_own_ids(svg, label)}'


def _own_ids(svg: str, label: str) -> str:
    """Ids that no other figure of the page has; none where nothing refers to them."""
    own = re.sub(r"\W+", "-", label)[:40]
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{own}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\1{own}-", svg)
