"""Results of a table as Markdown, and its place in a document: from <!-- table:NAME --> to <!-- /table:NAME -->."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.output import write_text
from qsam2.sweep.results import Results

UNITS = {"davis": "J&F", "sav": "J&F by SA-V's protocol", "stills": "mask IoU from a box"}


def render(results: Results) -> str:
    """One table per set and float model; those of the first set are open, the others folded.

    Rows and columns in which no run has ended are left out.
    """
    parts = [_caption(results)]
    begun = {cell["model"] for cell in results["cells"] if _begun(cell)}
    for index, (name, scored) in enumerate(results["sets"].items()):
        tables = [_table(results, name, model) for model in results["float"] if model in begun]
        heading = f"{_data(name, scored)}: {UNITS[scored['protocol']]}"
        text = "\n\n".join(tables)
        folded = f"<details><summary>{heading}</summary>\n\n{text}\n\n</details>"
        parts.append(folded if index else f"On {heading}:\n\n{text}")
    return "\n\n".join(parts)


def write_table(name: str, results: Results, folder: Path, document: Path | None = None) -> str:
    """Write a table into the folder of its runs and, with `document`, into it and docs/tables/ beside it.

    Returns:
        The table as Markdown.
    """
    text, figures = render(results), json.dumps(results, indent=1)
    write_text(folder / "table.json", figures)
    write_text(folder / "table.md", text)
    if document:
        beside = document.absolute().parent
        docs = beside if beside.name == "docs" else beside / "docs"
        write_text(docs / "tables" / f"{name}.json", figures + "\n")
        insert(document, name, text)
    return text


def insert(document: Path, name: str, text: str) -> None:
    """Put a table between its markers.

    Raises:
        UserError: the document cannot be read or lacks the markers.
    """
    before, _, after = _split(document, name)
    write_text(document, f"{before}\n\n{text}\n\n{after}")


def extract(document: Path, name: str) -> str:
    """The text between a table's markers; raises UserError as `insert` does."""
    return _split(document, name)[1].strip()


def _split(document: Path, name: str) -> tuple[str, str, str]:
    start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if not document.is_file():
        raise UserError(f"{document} does not exist; give a Markdown file that holds {start} and {end}")
    head, opened, rest = document.read_text().partition(start)
    inside, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise UserError(f"{document} lacks a place for the table: write the lines {start} and {end} where it belongs")
    return head + start, inside, end + tail


def _caption(results: Results) -> str:
    budget, runs = dict(results["budget"]), results["runs"]
    data = ", ".join(f"`{source}`" for source in budget.pop("data", ()))
    spent = ", ".join(f"{value} {key}" for key, value in budget.items())
    seeds = sorted({seed for cell in results["cells"] for seed in cell["seeds"]})
    several = "; ± is the standard deviation over seeds" if len(seeds) > 1 else ""
    missing = "".join(
        f", {count} {what}"
        for what, count in (("failed", runs["failed"]), ("to come", runs["all"] - runs["finished"] - runs["failed"]))
        if count
    )
    time = f", median duration {runs['median_seconds']:.0f} s" if runs["finished"] else ""
    return (
        f"**{results['title']}**\n\n    {results['command']}\n\n"
        f"{runs['finished']} runs{time}{missing}. The same in all runs: {spent}; data {data}. "
        f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds)) or '-'}{several}. "
        f"qsam2 {', '.join(results['versions'])}. A cell is the score, in parentheses the 95 % interval of its "
        "difference to float (paired bootstrap over objects), then the fidelity; the best score of a column is bold."
    )


def _table(results: Results, name: str, model: str) -> str:
    own = [cell for cell in results["cells"] if cell["model"] == model]
    begun = [cell for cell in own if _begun(cell)]
    settings = [setting for setting in results["settings"] if any(cell["setting"] == setting for cell in begun)]
    best = {
        setting: max((c["sets"][name]["score"] for c in own if c["setting"] == setting and c["sets"]), default=None)
        for setting in settings
    }
    rows = list(dict.fromkeys((cell["method"], cell["start"]) for cell in begun))
    by_place = {(cell["method"], cell["start"], cell["setting"]): cell for cell in own}
    starts = any(start for _, start in rows)
    lines = [
        _row([f"{model}, float {results['float'][model][name]:.1f}", *(["start"] if starts else []), *settings]),
        "|" + "---|" * (1 + starts + len(settings)),
    ]
    methods = [method for method, _ in rows]
    for method, start in sorted(rows, key=lambda row: methods.index(row[0])):
        cells = [_cell(by_place.get((method, start, setting)), name, best[setting]) for setting in settings]
        lines.append(_row([method, *([start] if starts else []), *cells]))
    return "\n".join(lines)


def _begun(cell: dict[str, Any]) -> bool:
    return bool(cell["sets"] or cell["failed"])


def _cell(cell: dict[str, Any] | None, name: str, best: float | None) -> str:
    if cell is None:
        return ""
    if not cell["sets"]:
        return "failed" if cell["failed"] else "-"
    scored = cell["sets"][name]
    score = f"**{scored['score']:.1f}**" if scored["score"] == best else f"{scored['score']:.1f}"
    spread = "" if scored["std"] is None else f" ± {scored['std']:.1f}"
    return f"{score}{spread} ({scored['low']:+.1f} to {scored['high']:+.1f}) {scored['fidelity']:.0f}"


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _data(name: str, scored: dict[str, Any]) -> str:
    limits = [f"{scored[what]} {what}" for what in ("videos", "frames") if scored[what]]
    return f"{name} ({', '.join([scored['data'], *limits, str(scored['objects']) + ' objects'])})"
