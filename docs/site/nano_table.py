"""The README's table: schemes of the nano that ships, from finished run folders into docs/tables/nano.json.

    python docs/site/nano_table.py runs/ptq-w8a8 runs/ptq-w4a8 ...

takes scores, bytes and fidelity from each folder's metrics.json and measures CPU time: docs/clip.mp4 is tracked by the
float model as it is and by each model with `--fast`, in turn, and the median of the ratios is kept.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
RESULTS = DOCS / "tables" / "nano.json"
ROUNDS = 5


def measure(runs: list[Path]) -> dict[str, Any]:
    """Rows of the table: the float model, each run, and what was not measured."""
    import yaml

    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    recipes = [yaml.safe_load((run / "recipe.yaml").read_text()) for run in runs]
    ratios = cpu_ratios(runs)
    score = metrics[0]["float"]
    rows = [{"scheme": "float32", "mb": metrics[0]["bytes"]["float32"] / 1e6, "score": score["J&F"], "cpu": 1.0}]
    for figures, recipe, ratio in zip(metrics, recipes, ratios, strict=True):
        quantized = figures["quantized"]
        rows.append(
            {
                "scheme": scheme(recipe),
                "mb": figures["bytes"]["packed"] / 1e6,
                "score": quantized["J&F"],
                "low": quantized["versus_float"]["low"],
                "high": quantized["versus_float"]["high"],
                "difference": quantized["versus_float"]["difference"],
                "unit": quantized["versus_float"]["unit"],
                "fidelity": quantized["fidelity"],
                "cpu": ratio,
            }
        )
    rows.append({"scheme": "`tiny` to `large`, any scheme"})
    versus = metrics[0]["quantized"]["versus_float"]
    return {"rows": rows, "objects": versus["objects"], "videos": versus["videos"]}


def cpu_ratios(runs: list[Path]) -> list[float]:
    """CPU time of tracking the clip with `--fast` over that of the float model without, one ratio per run."""
    import qsam2

    predictors = [qsam2.video_predictor("nano"), *(qsam2.video_predictor(run, fast=True) for run in runs)]
    rounds = []
    for _ in range(ROUNDS + 1):
        times = []
        for predictor in predictors:
            state = predictor.init_state(str(DOCS / "clip.mp4"))
            predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[140, 112]], labels=[1])
            start = time.process_time()
            for _ in predictor.propagate_in_video(state):
                pass
            times.append(time.process_time() - start)
        rounds.append([seconds / times[0] for seconds in times[1:]])
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]  # the first round warms up


def scheme(recipe: dict[str, Any]) -> str:
    """Name of what a recipe does, as `W4A4, GPTQ`."""
    quantize, calibrate = recipe["quantize"], recipe["calibrate"]
    bits = f"W{quantize['weights']['bits']}A{quantize['activations']['bits']}"
    steps = [name for key, name in (("weights", "Frobenius"), ("rounding", "GPTQ")) if calibrate[key]]
    if recipe["reconstruct"]:
        steps.append(recipe["reconstruct"]["method"])
    training = f"QAT, {recipe['trainer']['max_steps']} steps" if recipe["train"] else "PTQ"
    return ", ".join([bits, training, *steps])


def markdown(results: dict[str, Any]) -> str:
    """The table as the README and the site show it."""
    columns = ["scheme", "MB", "J&F", "difference to float, 95 % interval", "fidelity", "CPU time, `--fast`"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in results["rows"]:
        difference = "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(**row) if "low" in row else "-"
        difference += "°" if "low" in row and "unit" not in row else ""  # of before 2026-11-30, of another kind
        fidelity = number(row["fidelity"]) if "fidelity" in row else "-"
        cells = [number(row.get("mb")), number(row.get("score")), difference, fidelity, number(row.get("cpu"), 2)]
        lines.append(f"| {row['scheme']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None, digits: int = 1) -> str:
    """Rounded, or `not measured`."""
    return "not measured" if value is None else f"{value:.{digits}f}"


def page(results: dict[str, Any]) -> str:
    """The site's page of the table."""
    text = RESULTS.with_suffix(".md").read_text()
    return f"# The nano that ships\n\n{text.replace('<!-- table -->', markdown(results))}"


if __name__ == "__main__":
    measured = measure([Path(run) for run in sys.argv[1:]])
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    readme = DOCS.parent / "README.md"
    table = f"<!-- nano -->\n{markdown(measured)}\n<!-- /nano -->"
    readme.write_text(re.sub("<!-- nano -->.*<!-- /nano -->", table, readme.read_text(), flags=re.DOTALL))
