"""Several runs on one page: scores side by side, against bytes and time, and what their recipes differ in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from qsam2.errors import UserError
from qsam2.output import version
from qsam2.report.curves import draw_loss
from qsam2.report.draw import Point, draw_pareto
from qsam2.report.page import bits, environment, headline
from qsam2.report.read import SavedRun
from qsam2.run_folder import flat

APART = ("name", "output")
"""Keys in which all recipes differ."""


def render_comparison(runs: Sequence[SavedRun]) -> str:
    """The page of several runs as HTML.

    Raises:
        UserError: a run is given twice, or none has scores.
    """
    names = unique_names(runs)
    scored = {name: run for name, run in names.items() if run.final is not None and "float" in run.metrics}
    if not scored:
        raise UserError(f"{', '.join(names)}: none of these runs has scores yet; finish one of them first")
    rows = {name: headline(run.metrics)[-1] for name, run in scored.items()}
    curves = {name: run.curves["loss"] for name, run in names.items() if "loss" in run.curves}
    losses = draw_loss(curves)
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            version=version(),
            runs=names,
            rows=rows,
            floats={name: headline(run.metrics)[0] for name, run in scored.items()},
            bits=bits,
            unfinished={name: run.missing_stages for name, run in names.items() if run.missing_stages},
            settings=_settings(scored),
            by_bytes=_pareto(scored, lambda row: row["MB"][0], "MB"),
            by_time=_pareto(scored, lambda row: row["seconds"][0], "seconds a frame"),
            loss=Markup(losses) if losses else None,
            trained=list(curves),
            differences=recipe_differences(names),
        )
    )


def unique_names(runs: Sequence[SavedRun]) -> dict[str, SavedRun]:
    """Runs by the names of their folders, by their paths where two are the same.

    Raises:
        UserError: a run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{twice} is given twice: give different runs")
    short = [run.name for run in runs]
    return {str(run.path) if short.count(run.name) > 1 else run.name: run for run in runs}


def recipe_differences(runs: dict[str, SavedRun]) -> dict[str, list[Any]]:
    """{dotted key: its value in each run} of the keys that differ.

    Of a part that some recipes leave out (`train: null`) a row says which have it, by its method where it has one; its
    keys are listed where those that have it differ.
    """
    recipes = [flat(run.recipe.model_dump(mode="json")) for run in runs.values()]
    parts = {
        key.rsplit(".", depth)[0] for recipe in recipes for key in recipe for depth in range(1, key.count(".") + 1)
    }
    differences = {}
    for key in sorted({key for recipe in recipes for key in recipe if key not in APART}):
        present = [recipe[key] for recipe in recipes if key in recipe]
        if key in parts:
            differences[key] = [_part(recipe, key) for recipe in recipes]
        elif any(value != present[0] for value in present):
            differences[key] = [recipe.get(key) for recipe in recipes]
    return differences


def _part(recipe: dict[str, Any], part: str) -> Any:
    given = any(key.startswith(f"{part}.") for key in recipe)
    return recipe.get(f"{part}.method", "given") if given else None


def _settings(runs: dict[str, SavedRun]) -> list[str]:
    """What the runs were scored on, if that differs: their scores are then of different things."""
    said = {
        name: f"{name}: {run.recipe.data.scored}, {run.recipe.evaluate.protocol} protocol, "
        f"{run.recipe.evaluate.videos or 'all'} videos, {run.recipe.evaluate.frames or 'all'} frames"
        for name, run in runs.items()
    }
    different = {text.removeprefix(f"{name}: ") for name, text in said.items()}
    return list(said.values()) if len(different) > 1 else []


def _pareto(runs: dict[str, SavedRun], cost: Callable[[dict[str, Any]], float | None], axis: str) -> Markup | None:
    points: list[Point] = []
    for name, run in runs.items():
        for row in headline(run.metrics):
            is_float = row["model"] == "float"
            if row["model"] == "ptq" or cost(row) is None or "J&F" not in row:
                continue  # of a run that trains, a way station; of one that does not, the same as `quantized`
            label = f"float {run.recipe.model.size}" if is_float and run.recipe.quantize is not None else name
            point = Point(label, float(cost(row) or 0.0), row["J&F"][0], is_float)
            if not any((other.label, other.score) == (point.label, point.score) for other in points):
                points.append(point)
    return Markup(draw_pareto(points, axis)) if points else None
