"""Results of a table: its cells as plain values, and as Markdown.

Its place in a document is from <!-- table:NAME --> to <!-- /table:NAME -->.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from qsam2.errors import UserError, short
from qsam2.evaluation.metrics.interval import paired_difference
from qsam2.evaluation.metrics.scores import amount_text
from qsam2.formats.card import checkpoint_source
from qsam2.inputs import read_json, read_text
from qsam2.output import write_text
from qsam2.sweep.scores import is_finished, read_scores
from qsam2.sweep.table import Place, ScoredSet, TableDefinition, TableRun, float_runs

Results = dict[str, Any]
"""Results of a table, as plain values."""


class _Cell(TypedDict):
    digest: Any
    sets: dict[str, Any]
    seeds: list[int]
    model: str


class _Results(TypedDict):
    name: str
    cells: list[_Cell]
    runs: dict[str, Any]
    versions: list[str]
    sets: dict[str, Any]
    float: dict[str, dict[str, Any]]


ENDS = ("difference", "low", "high")
POOLED = "All videos"
"""Name of the sets of videos together, where there are several."""
UNITS = {"davis": "J&F", "sav": "J&F by SA-V's protocol", "stills": "mask IoU from a box"}


def read_results(file: Path, table: TableDefinition) -> Results:
    """Read earlier results of a table; raises UserError if the file holds something else."""
    results: Results = read_json(
        file, _Results, what="the results of a table", advice="give the JSON that --write wrote"
    )
    if results["name"] != table.name:
        raise UserError(f"{file} holds the results of table {short(results['name'])!r}, not of {table.name!r}")
    return results


def valid_cells(table: TableDefinition, runs: Iterable[TableRun], earlier: Results) -> dict[Place, dict[str, Any]]:
    """The scored cells of earlier results whose recipes, data and checkpoints are those of the table."""
    cells = {Place(*(cell[axis] for axis in Place._fields)): cell for cell in earlier["cells"] if cell["sets"]}
    digests = {place: _digest(table, seeds) for place, seeds in _by_place(runs).items() if place in cells}
    return {place: cells[place] for place, digest in digests.items() if cells[place]["digest"] == digest}


def left_to_run(table: TableDefinition, runs: Sequence[TableRun], earlier: Results) -> list[TableRun]:
    """The runs of cells that earlier results do not hold with all seeds."""
    valid, places = valid_cells(table, runs, earlier), _by_place(runs)
    complete = {place for place, cell in valid.items() if len(cell["seeds"]) == len(places[place])}
    return [run for run in runs if run.place not in complete]


def collect(table: TableDefinition, runs: Sequence[TableRun], command: str, earlier: Results | None = None) -> Results:
    """The results of a table so far; `command` regenerates them.

    Scores of several seeds are averaged per object before they are compared; `std` is their standard deviation.
    Valid cells of `earlier` results are used if the runs' folders have fewer seeds (see `valid_cells`). Raises
    UserError if a float model is not scored.
    """
    valid = valid_cells(table, runs, earlier) if earlier else {}
    reference = {place.model: earlier["float"][place.model] for place in valid} if earlier else {}
    floats = {}
    for run in float_runs(runs):
        scores = read_scores(run)
        if scores is not None and is_finished(table, run):
            floats[run.place.model] = scores
            blocks = with_pooled({name: scores["sets"][name]["block"] for name in table.sets})
            reference[run.place.model] = {name: _score(block) for name, block in blocks.items()}
        elif run.place.model not in reference:
            error = f": {scores['error']}" if scores and scores["error"] else ""
            raise UserError(
                f"table {table.name}: the float model {run.place.model!r} is not scored{error}; run the table again"
            )
    begun = [scores for run in runs if (scores := read_scores(run))]
    finished = [scores for scores in begun if scores["sets"].keys() >= table.sets.keys() and not scores["error"]]
    seconds = [scores["seconds"] for scores in finished]
    versions = {scores["version"] for scores in [*floats.values(), *finished]}
    sets: dict[str, Any] = {}
    for scores in floats.values():
        for name, block in with_pooled({name: scores["sets"][name]["block"] for name in table.sets}).items():
            amount = {"objects": sum(map(len, block["per_object"].values())), "scored": amount_text(block)}
            of = table.sets[name].model_dump() if name in table.sets else dict.fromkeys(ScoredSet.model_fields)
            sets[name] = {**of, "protocol": block["protocol"], **amount}
    if earlier and valid:
        versions |= {*earlier["versions"]}
        sets = earlier["sets"]
        seconds = seconds or [earlier["runs"]["median_seconds"]]
    cells = []
    for place, seeds in _by_place(runs).items():
        cell = _cell(table, place, seeds, floats.get(place.model))
        kept = valid.get(place)
        cells.append(kept if kept and len(kept["seeds"]) > len(cell["seeds"]) else cell)
    return {
        "name": table.name,
        "title": table.title,
        "command": command,
        "budget": _budget(runs),
        "runs": {
            "all": len(runs),
            "finished": sum(len(cell["seeds"]) for cell in cells),
            "failed": sum(cell["failed"] for cell in cells),
            "median_seconds": statistics.median(seconds) if seconds else None,
        },
        "versions": sorted(versions),
        "sets": sets,
        "settings": list(table.settings),
        "float": reference,
        "cells": cells,
    }


def _by_place(runs: Iterable[TableRun]) -> dict[Place, list[TableRun]]:
    places: dict[Place, list[TableRun]] = {}
    for run in runs:
        places.setdefault(run.place, []).append(run)
    return places


def _digest(table: TableDefinition, runs: Sequence[TableRun]) -> str:
    """SHA-256 of everything that determines a cell's scores, except for the version of qsam2."""
    causes = {
        "recipes": [run.values for run in runs],
        "source": checkpoint_source(runs[0].recipe),
        "sets": {name: scored.model_dump() for name, scored in table.sets.items()},
    }
    return hashlib.sha256(json.dumps(causes, sort_keys=True).encode()).hexdigest()


def _cell(table: TableDefinition, place: Place, runs: Sequence[TableRun], reference: Any) -> dict[str, Any]:
    finished = [run for run in runs if is_finished(table, run)]
    found = [scores["sets"] for run in finished if (scores := read_scores(run))]
    scored = [with_pooled({name: sets[name]["block"] for name in table.sets}) for sets in found]
    sets = {}
    if scored:
        theirs = with_pooled({name: reference["sets"][name]["block"] for name in table.sets})
        sets = {name: _against([blocks[name] for blocks in scored], block) for name, block in theirs.items()}
    return {
        **place._asdict(),
        "digest": _digest(table, runs),
        "seeds": [run.recipe.seed for run in finished],
        "failed": sum(bool((scores := read_scores(run)) and scores["error"]) for run in runs),
        "sets": sets,
    }


def with_pooled(blocks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Score blocks of sets by name; where several have videos, before them one of all their videos, `POOLED`."""
    videos = {name: block for name, block in blocks.items() if block["protocol"] != "stills"}
    if len(videos) < 2:
        return blocks
    counts = [sum(map(len, block["per_object"].values())) for block in videos.values()]
    pooled: dict[str, Any] = {
        "protocol": " and ".join(dict.fromkeys(block["protocol"] for block in videos.values())),
        "per_object": {f"{name}/{video}": items for name, block in videos.items()
                       for video, items in block["per_object"].items()},
    }  # fmt: skip
    for key in ("J&F", "fidelity"):
        if all(block.get(key) is not None for block in videos.values()):
            pooled[key] = float(np.average([block[key] for block in videos.values()], weights=counts))
    if all("scored" in block for block in videos.values()):
        pooled["scored"] = dict(sum((Counter(block["scored"]) for block in videos.values()), Counter()))
    return {POOLED: pooled, **blocks}


def _against(blocks: Sequence[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """Mean score and fidelity over seeds, and the difference to float with its 95 % interval."""
    key = "box_IoU" if reference["protocol"] == "stills" else "J&F"
    mean = {
        group: {item: {key: float(np.mean([b["per_object"][group][item][key] for b in blocks]))} for item in items}
        for group, items in reference["per_object"].items()
    }
    unit = "images" if reference["protocol"] == "stills" else "videos"
    versus = paired_difference(mean, reference["per_object"], key=key, unit=unit)
    scores = [_score(block) for block in blocks]
    return {
        "score": round(statistics.mean(scores), 3),
        "std": round(statistics.stdev(scores), 3) if len(scores) > 1 else None,
        "fidelity": round(statistics.mean(block["fidelity"] for block in blocks), 3),
        **{part: value if value is None else round(value, 3) for part, value in versus.items() if part in ENDS},
        "unit": unit,
        unit: versus[unit],
    }


def _score(block: dict[str, Any]) -> float:
    return round(block["box_mIoU" if block["protocol"] == "stills" else "J&F"], 3)


def _budget(runs: Sequence[TableRun]) -> dict[str, Any]:
    """Data, calibration and training settings that are the same for all runs."""
    budgets = []
    for recipe in (run.recipe for run in runs):
        trained: dict[str, Any] = {
            "steps": [stage.trainer.max_steps for stage in recipe.training],
            "clips a step": [stage.data.batch_size * stage.trainer.accumulate for stage in recipe.training],
            "frames a clip": [stage.data.num_frames for stage in recipe.training],
        }
        trained = {key: each[0] if len(each) == 1 else each for key, each in trained.items()}
        calibrated = {
            "data": list(recipe.data.train),
            "calibration clips": recipe.calibrate.clips,
            "frames a calibration clip": recipe.calibrate.num_frames,
            "calibration stills": recipe.calibrate.stills,
        }
        budgets.append(calibrated | (trained if recipe.train else {}))
    return {key: value for key, value in budgets[0].items() if all(other.get(key) == value for other in budgets)}


# As Markdown


def render(results: Results) -> str:
    """One table per set and float model, the first set's open; without rows and columns in which no run has ended."""
    parts = [_caption(results)]
    begun = {cell["model"] for cell in results["cells"] if cell["sets"] or cell["failed"]}
    for index, (name, scored) in enumerate(results["sets"].items()):
        tables = [_table(results, name, model) for model in results["float"] if model in begun]
        limits = [f"{scored[what]} {what}" for what in ("videos", "frames") if scored[what]]
        amount = scored.get("scored") or f"{scored['objects']} objects"
        of = [scored["data"] or ", ".join(other for other in results["sets"] if other != POOLED)]
        data = ", ".join([*of, *(f"first {limit}" for limit in limits)]) + f"; {amount}"
        heading = f"{name} ({data}): {UNITS.get(scored['protocol'], UNITS['davis'])}"
        text = "\n\n".join(tables)
        folded = f"<details><summary>{heading}</summary>\n\n{text}\n\n</details>"
        parts.append(folded if index else f"On {heading}:\n\n{text}")
    return "\n\n".join(parts)


def write_table(name: str, results: Results, folder: Path, document: Path | None = None) -> str:
    """Write a table into the folder of its runs, a document and docs/tables/ beside that; returns it as Markdown."""
    text, figures = render(results), json.dumps(results, indent=1)
    write_text(folder / "table.json", figures)
    write_text(folder / "table.md", text)
    if document:
        beside = document.absolute().parent
        docs = beside if beside.name == "docs" else beside / "docs"
        write_text(docs / "tables" / f"{name}.json", figures + "\n")
        before, _, after = _split(document, name)
        write_text(document, f"{before}\n\n{text}\n\n{after}")
    return text


def extract(document: Path, name: str) -> str:
    """The text between a table's markers; raises UserError if the document cannot be read or lacks them."""
    return _split(document, name)[1].strip()


def _split(document: Path, name: str) -> tuple[str, str, str]:
    start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if not document.is_file():
        raise UserError(f"{document} does not exist; give a Markdown file that holds {start} and {end}")
    head, opened, rest = read_text(document).partition(start)
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
    missing = {"failed": runs["failed"], "to come": runs["all"] - runs["finished"] - runs["failed"]}
    left = "".join(f", {count} {what}" for what, count in missing.items() if count)
    time = f", median duration {runs['median_seconds']:.0f} s" if runs["finished"] else ""
    return (
        f"**{results['title']}**\n\n    {results['command']}\n\n"
        f"{runs['finished']} runs{time}{left}. The same in all runs: {spent}; data {data}. "
        f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds)) or '-'}{several}. "
        f"qsam2 {', '.join(results['versions'])}. A cell is the score, in parentheses the 95 % interval of its "
        f"difference to float, then the fidelity; the best score of a column is bold. {_intervals(results)}"
    )


def _is_old(scored: dict[str, Any]) -> bool:
    """True for a cell of before 2026-11-30, whose interval is of another kind: it holds no unit."""
    return "unit" not in scored


def _intervals(results: Results) -> str:
    """Sentences about the kind of the intervals."""
    old = [_is_old(scored) for cell in results["cells"] for scored in cell["sets"].values()]
    text = "Intervals are t intervals with videos (or images) as units."
    if not any(old):
        return text
    narrow = (
        "percentile intervals over objects, which are too narrow: they cover the true difference in 77 to 87 of 100 "
        "cases instead of 95 (docs/experiments.md, 2026-11-30), and the scores of each object, which others need, were "
        "not kept."
    )
    return f"Intervals are {narrow}" if all(old) else f"{text} Those marked ° are {narrow}"


def _table(results: Results, name: str, model: str) -> str:
    own = [cell for cell in results["cells"] if cell["model"] == model]
    begun = [cell for cell in own if cell["sets"] or cell["failed"]]
    settings = [setting for setting in results["settings"] if any(cell["setting"] == setting for cell in begun)]
    best = {
        setting: max(
            (c["sets"][name]["score"] for c in own if c["setting"] == setting and name in c["sets"]), default=None
        )
        for setting in settings
    }
    rows = list(dict.fromkeys((cell["method"], cell["start"]) for cell in begun))
    by_place = {(cell["method"], cell["start"], cell["setting"]): cell for cell in own}
    starts, mixed = any(start for _, start in rows), "°" in _intervals(results)
    lines = [
        _row([f"{model}, float {results['float'][model][name]:.1f}", *(["start"] if starts else []), *settings]),
        "|" + "---|" * (1 + starts + len(settings)),
    ]
    methods = [method for method, _ in rows]
    for method, start in sorted(rows, key=lambda row: methods.index(row[0])):
        cells = [_text(by_place.get((method, start, setting)), name, best[setting], mixed) for setting in settings]
        lines.append(_row([method, *([start] if starts else []), *cells]))
    return "\n".join(lines)


def _text(cell: dict[str, Any] | None, name: str, best: float | None, mixed: bool) -> str:
    if cell is None:
        return ""
    if not cell["sets"]:
        return "failed" if cell["failed"] else "-"
    scored = cell["sets"].get(name)
    if scored is None:  # of results from before sets were pooled
        return "-"
    score = f"**{scored['score']:.1f}**" if scored["score"] == best else f"{scored['score']:.1f}"
    spread = "" if scored["std"] is None else f" ± {scored['std']:.1f}"
    return f"{score}{spread} {_ends(scored)}{'°' if mixed and _is_old(scored) else ''} {scored['fidelity']:.0f}"


def _ends(scored: dict[str, Any]) -> str:
    if scored["low"] is None:
        return f"(no interval: one {scored['unit'].removesuffix('s')})"
    return f"({scored['low']:+.1f} to {scored['high']:+.1f})"


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
