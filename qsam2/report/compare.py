"""The page of several runs: scores side by side, accuracy against bytes, differences of the recipes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from qsam2.errors import UserError
from qsam2.report.draw import Point, draw_loss, draw_pareto
from qsam2.report.page import fill, score_rows
from qsam2.report.read import SavedRun
from qsam2.run import flat

APART = ("name", "output")
"""Recipe keys that differ between any two runs: not listed."""


def render_comparison(runs: Sequence[SavedRun]) -> str:
    """The page as HTML; UserError if a run is given twice, or none has scores."""
    names = unique_names(runs)
    shipped = {name: "float" if run.recipe.quantize is None else "quantized" for name, run in names.items()}
    scored = {name: run for name, run in names.items() if {"float", shipped[name]} <= run.metrics.keys()}
    if not scored:
        raise UserError(f"{', '.join(names)}: none of these runs has scores yet; finish one of them first")
    curves = {name: run.curves["loss"] for name, run in names.items() if "loss" in run.curves}
    scores = {name: score_rows(run.metrics) for name, run in scored.items()}
    return fill(
        "compare.html.j2",
        runs=names,
        rows={name: rows[-1] for name, rows in scores.items()},
        floats={name: rows[0] for name, rows in scores.items()},
        calibrated={name: rows[1] for name, rows in scores.items() if names[name].recipe.train and len(rows) == 3},
        unfinished={name: run.missing_stages for name, run in names.items() if run.missing_stages},
        settings=_settings(scored),
        trained_steps=any(run.recipe.train for run in runs),
        by_bytes=_pareto(scored, scores),
        loss=draw_loss(curves),
        trained=list(curves),
        differences=recipe_differences(names),
    )


def unique_names(runs: Sequence[SavedRun]) -> dict[str, SavedRun]:
    """Runs by folder name, or by path below the folder of all if two have the same name.

    Raises:
        UserError: a run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{twice} is given twice: give different runs")
    short = [run.name for run in runs]
    above = os.path.commonpath(paths)
    return {os.path.relpath(path, above) if short.count(run.name) > 1 else run.name: run
            for path, run in zip(paths, runs, strict=True)}  # fmt: skip


def recipe_differences(runs: dict[str, SavedRun]) -> dict[str, list[Any]]:
    """{dotted key: its value in each run} of the keys that differ.

    A section that some recipes leave out (`train: null`) has a row with its method, or "given", in the recipes that
    have it; its keys have rows if they differ among those recipes.
    """
    recipes = [flat(run.recipe.model_dump(mode="json")) for run in runs.values()]
    sections = {
        key.rsplit(".", depth)[0] for recipe in recipes for key in recipe for depth in range(1, key.count(".") + 1)
    }
    differences = {}
    for key in sorted({key for recipe in recipes for key in recipe if key not in APART}):
        present = [recipe[key] for recipe in recipes if key in recipe]
        if key in sections:
            differences[key] = [
                recipe.get(f"{key}.method", "given") if any(other.startswith(f"{key}.") for other in recipe) else None
                for recipe in recipes
            ]
        elif any(value != present[0] for value in present):
            differences[key] = [recipe.get(key) for recipe in recipes]
    return differences


def _settings(runs: dict[str, SavedRun]) -> list[str]:
    """Evaluation settings of each run if they differ, which makes scores incomparable; else nothing."""
    settings = {
        name: f"{run.recipe.data.scored}, {run.recipe.evaluate.protocol} protocol, "
        f"{run.recipe.evaluate.videos or 'all'} videos, {run.recipe.evaluate.frames or 'all'} frames"
        for name, run in runs.items()
    }
    differ = len(set(settings.values())) > 1
    return [f"{name}: {text}" for name, text in settings.items()] if differ else []


def _pareto(runs: dict[str, SavedRun], scores: dict[str, list[dict[str, Any]]]) -> Markup | None:
    """J&F of all models against their bytes; None if no model has both."""
    points: dict[tuple[str, float], Point] = {}
    for name, run in runs.items():
        for row in scores[name]:
            is_float = row["model"] == "float"
            if row["model"] == "ptq" or not row["MB"] or "J&F" not in row:
                continue  # an intermediate model if the run trains, else the same as `quantized`
            label = f"float {run.recipe.model.size}" if is_float and run.recipe.quantize is not None else name
            point = Point(label, row["MB"], row["J&F"][0], is_float)
            points.setdefault((label, point.score), point)
    return draw_pareto(list(points.values()), "MB") if points else None
