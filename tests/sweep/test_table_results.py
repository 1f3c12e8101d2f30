"""Figures of a table's cells, and the Markdown that shows them, in the README too."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from small_table import scores, small_table, write

import qsam2
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.evaluation.metrics.interval import paired_difference
from qsam2.evaluation.metrics.scores import amount_text
from qsam2.sweep.results import (
    POOLED,
    Results,
    collect,
    extract,
    left_to_run,
    read_results,
    render,
    with_pooled,
    write_table,
)
from qsam2.sweep.scores import save_scores
from qsam2.sweep.table import Place, TableDefinition, TableRun, float_runs

ROOT = Path(qsam2.__file__).parents[1]
SCORES = {"nano_minmax_W4A4_s0": 45.0, "nano_mse_W4A4_s0": 46.0, "nano_mse_W4A4_s1": 48.0, "nano_mse_W2A4_s0": 20.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def table(folder: Path) -> tuple[TableDefinition, list[TableRun]]:
    """Float 50; one run failed, the frobenius ones are to come."""
    table, runs = small_table(folder)
    for run in float_runs(runs):
        save_scores(run, scores(table, run, 50.0))
    for run in runs:
        if run.name in SCORES:
            save_scores(run, scores(table, run, SCORES[run.name], version="1.1"))
    failed = next(run for run in runs if run.name == "nano_minmax_W2A4_s0")
    save_scores(failed, {**scores(table, failed, 0.0), "sets": {}, "error": "the loss is nan"})
    return table, runs


@pytest.fixture(scope="module")
def results(table: tuple[TableDefinition, list[TableRun]]) -> Results:
    return json.loads(json.dumps(collect(*table, "qsam2 table small.yaml")))


def cell(results: Results, method: str, setting: str, start: str = "") -> dict[str, Any]:
    (found,) = (c for c in results["cells"] if (c["method"], c["setting"], c["start"]) == (method, setting, start))
    return found


def test_cells(results: Results) -> None:
    """Seeds are averaged and have a spread; one seed has none; what did not end has no score."""
    several, one, failed = (cell(results, *at) for at in (("mse", "W4A4"), ("minmax", "W4A4"), ("minmax", "W2A4")))
    assert several["seeds"] == [0, 1]
    assert several["sets"]["clips"] == {
        "score": 48.0, "std": 1.414, "fidelity": 90.0, "difference": -3.0, "low": -3.0, "high": -3.0,
        "unit": "videos", "videos": 2,
    }  # fmt: skip
    assert several["sets"]["stills"]["score"] == 24.5 and several["sets"]["stills"]["difference"] == -1.5
    assert one["sets"]["clips"]["std"] is None
    assert failed == {"digest": failed["digest"]} | {
        "model": "nano", "method": "minmax", "start": "", "setting": "W2A4", "seeds": [], "failed": 1, "sets": {}
    }  # fmt: skip
    assert cell(results, "mse", "W4A4", "frobenius")["failed"] == 0
    assert results["runs"] == {"all": 7, "finished": 4, "failed": 1, "median_seconds": 10.0}
    assert results["float"] == {"nano": {"clips": 51.0, "stills": 26.0}}
    assert results["versions"] == ["1.0 (abc)", "1.1"]


def test_a_budget_that_differs_is_not_called_the_same(
    table: tuple[TableDefinition, list[TableRun]], results: Results
) -> None:
    same = {"data": ["moving_objects"], "frames a calibration clip": 6, "calibration stills": 32}
    assert results["budget"] == same | {"calibration clips": 8}
    definition, (first, *others) = table
    calibrate = first.recipe.calibrate.model_copy(update={"clips": 5})
    changed = dataclasses.replace(first, recipe=first.recipe.model_copy(update={"calibrate": calibrate}))
    assert collect(definition, [changed, *others], "")["budget"] == same


def test_without_the_float_model_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="table small: the float model 'nano' is not scored; run the table again"):
        collect(*small_table(tmp_path), "")


def test_cells_of_earlier_results_stand_where_the_folders_are_gone(results: Results, tmp_path: Path) -> None:
    table, runs = small_table(tmp_path)
    assert collect(table, runs, results["command"], results) == results | {"runs": results["runs"] | {"failed": 0}} | {
        "cells": [c if c["sets"] else c | {"failed": 0} for c in results["cells"]]
    }
    left = left_to_run(table, runs, results)
    assert [run.name for run in left] == [run.name for run in runs if run.name not in SCORES]


def test_intervals_of_another_kind_are_told_apart(results: Results) -> None:
    cells = copy.deepcopy(results["cells"])
    assert "°" not in render(results) and "t intervals with videos" in render(results)
    for scored in cells[0]["sets"].values():
        del scored["unit"], scored["low"], scored["high"]
        scored |= {"low": -1.25, "high": 0.5}
    mixed = render(results | {"cells": cells})
    assert "(-1.2 to +0.5)°" in mixed and "Those marked ° are percentile intervals over objects" in mixed
    old = render(results | {"cells": cells[:1]})
    assert "(-1.2 to +0.5) " in old and "°" not in old and "Intervals are percentile intervals over objects" in old


def test_a_cell_is_kept_with_all_its_seeds_or_run_again_with_all(results: Results, tmp_path: Path) -> None:
    table, runs = small_table(tmp_path)
    one = cell(results, "mse", "W4A4") | {"seeds": [0]}
    fewer = results | {"cells": [one if c["seeds"] == [0, 1] else c for c in results["cells"]]}
    both = [run for run in runs if run.place == Place("nano", "mse", "W4A4", "")]
    assert [run for run in left_to_run(table, runs, fewer) if run.place.method == "mse" and not run.place.start][
        :2
    ] == both
    assert cell(collect(table, runs, "", fewer), "mse", "W4A4")["seeds"] == [0]  # until there are more here
    for run in [*float_runs(runs), *both]:
        save_scores(run, scores(table, run, 30.0, version="2.0"))
    found = collect(table, runs, "", fewer)
    assert (
        cell(found, "mse", "W4A4")["seeds"] == [0, 1] and cell(found, "mse", "W4A4")["sets"]["clips"]["score"] == 31.0
    )
    assert cell(found, "minmax", "W4A4") == cell(results, "minmax", "W4A4")
    assert found["versions"] == ["1.0 (abc)", "1.1", "2.0"] and found["runs"]["finished"] == 4


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, 3),
        ({"methods": {"minmax": {"calibrate.clips": 3}}}, 4),
        ({"settings": {"W4A4": {"calibrate.clips": 3}}}, 6),
        ({"common": {"model.checkpoint": "nano.pt"}}, 7),
        ({"sets": {"stills": {"data": "coco:others"}}}, 7),
        ({"runs": [{"starts": [""]}, {"methods": ["mse"], "settings": ["W4A4"], "seeds": [0, 2]}]}, 5),
    ],
)
def test_earlier_cells_of_other_recipes_data_or_weights_are_run_again(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], left: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nano.pt").write_bytes(b"other weights")
    assert len(left_to_run(*small_table(tmp_path, **changes), results)) == left


def test_the_weights_behind_one_path_may_change(tmp_path: Path) -> None:
    file = tmp_path / "nano.pt"
    digests = []
    for content in (b"a", b"b", b"a"):
        file.write_bytes(content)
        changed, runs = small_table(tmp_path, common={"model.checkpoint": str(file)})
        for run in float_runs(runs):
            save_scores(run, scores(changed, run, 50.0))
        digests.append(collect(changed, runs, "")["cells"][0]["digest"])
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read .*: give the JSON that --write wrote"),
        ("{", "is not the results of a table"),
        ("[]", "is not the results of a table"),
        ('{"name": "small", "cells": [{}]}', "is not the results of a table"),
        (
            '{"name": "other", "cells": [], "runs": {}, "versions": [], "sets": {}, "float": {}}',
            "holds the results of table 'other', not of 'small'",
        ),
    ],
)
def test_what_is_no_earlier_result_is_refused(tmp_path: Path, content: str | None, why: str) -> None:
    file = tmp_path / "small.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"small.json {why}"):
        read_results(file, small_table(tmp_path)[0])


def test_markdown(results: Results) -> None:
    text = render(results)
    caption, _, rest = text.partition("\n\nOn clips")
    assert caption.startswith(
        "**A small table**\n\n    qsam2 table small.yaml\n\n4 runs, median duration 10 s, 1 failed"
    )
    assert ", 2 to come. The same in all runs: 8 calibration clips, 6 frames a calibration clip" in caption
    assert "Seeds 0, 1; ± is the standard deviation over seeds" in caption and "qsam2 1.0 (abc), 1.1." in caption
    assert rest.startswith(" (moving_objects:2:val, first 4 frames; 2 videos, 3 objects): J&F:\n\n| nano, float")
    assert [line for line in rest.partition("<details>")[0].splitlines() if line.startswith("|")] == [
        "| nano, float 51.0 | W4A4 | W2A4 |",
        "|---|---|---|",
        "| minmax | 46.0 (-5.0 to -5.0) 90 | failed |",
        "| mse | **48.0** ± 1.4 (-3.0 to -3.0) 90 | **21.0** (-30.0 to -30.0) 90 |",
    ]
    assert (
        "<details><summary>stills (coco:stills; 2 images, 3 instances): mask IoU from a box</summary>\n\n| nano, float"
        in rest
    )
    assert rest.count("</details>") == 1


def test_sets_of_videos_are_pooled_over_their_objects() -> None:
    """One video of three objects and one of one: each object counts once, each video is a unit."""

    def block(**scores: list[float]) -> dict[str, Any]:
        objects = {video: {str(k): {"J&F": v} for k, v in enumerate(values)} for video, values in scores.items()}
        flat = [value for values in scores.values() for value in values]
        counts = {"videos": len(scores), "frames": 10, "objects": len(flat)}
        return {"protocol": "davis", "per_object": objects, "J&F": mean(flat), "fidelity": flat[0], "scored": counts}

    alone = {"clips": block(a=[30.0, 60.0, 90.0]), "stills": {"protocol": "stills"}}
    assert with_pooled(alone) is alone
    blocks = with_pooled({**alone, "films": block(a=[20.0])})
    assert list(blocks) == [POOLED, "clips", "stills", "films"]
    pooled = blocks[POOLED]
    assert pooled["J&F"] == pytest.approx(50.0) and pooled["fidelity"] == pytest.approx((3 * 30 + 20) / 4)
    assert pooled["per_object"].keys() == {"clips/a", "films/a"}
    assert amount_text(pooled) == "2 videos, 20 frames, 4 objects"
    other = with_pooled({"clips": block(a=[28.0, 58.0, 88.0]), "films": block(a=[10.0])})[POOLED]
    assert paired_difference(other["per_object"], pooled["per_object"])["difference"] == pytest.approx(-4.0)


def test_what_is_to_come_has_a_place_beside_what_has_ended(results: Results) -> None:
    without = {"sets": {}, "failed": 0, "seeds": []}
    changed = [c | without if (c["method"], c["setting"]) == ("minmax", "W2A4") else c for c in results["cells"]]
    assert "| minmax | 46.0 (-5.0 to -5.0) 90 | - |" in render(results | {"cells": changed})
    assert "| nano, float" not in render(results | {"cells": [c | without for c in results["cells"]]})


def test_a_table_takes_its_place_between_the_markers(results: Results, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("# A\n\n<!-- table:x -->\nold\n<!-- /table:x -->\n\nafter\n")
    for _ in range(2):
        text = write_table("x", results, tmp_path / "out", document)
        assert document.read_text() == f"# A\n\n<!-- table:x -->\n\n{text}\n\n<!-- /table:x -->\n\nafter\n"
    assert extract(document, "x") == text
    with pytest.raises(UserError, match="README.md lacks a place for the table: write the lines <!-- table:y --> and"):
        extract(document, "y")
    with pytest.raises(UserError, match=r"none.md does not exist; give a Markdown file that holds <!-- table:x -->"):
        extract(tmp_path / "none.md", "x")


@pytest.mark.parametrize("place", ["README.md", "docs/small.md"])
def test_render_writes_what_is_finished_into_a_document(
    place: str, table: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures stand in docs/tables/, wherever the command is given."""
    write(folder)
    document = folder / place
    (folder / "docs").mkdir(exist_ok=True)
    for inside in (folder, folder / "docs"):
        document.unlink(missing_ok=True)
        monkeypatch.chdir(inside)
        shown, file, out = (os.path.relpath(folder / name) for name in (place, "small.yaml", "out"))
        given = ["table", file, "--output", out, "--render", "--write", shown, "--jobs", "2"]
        assert main(given) == 2
        assert f"{shown} does not exist" in capsys.readouterr().err
        document.write_text("<!-- table:small -->\n<!-- /table:small -->\n")
        assert main(given) == 0
        text = extract(document, "small")
        assert f"    qsam2 table {file} --jobs 2 --write {shown}\n" in text
        kept = json.loads((folder / "docs" / "tables" / "small.json").read_text())
        assert render(kept) == text == capsys.readouterr().out.strip() == (folder / "out" / "table.md").read_text()
        assert str(folder) not in text + json.dumps(kept) and not (folder / "docs" / "docs").exists()
    monkeypatch.chdir(folder)
    again = ["table", "small.yaml", "--output", "elsewhere", "--keep", "docs/tables/small.json"]
    assert main([*again, "--render", "--write", place, "--jobs", "2"]) == 0
    assert "| minmax | 46.0 (-5.0 to -5.0) 90 | - |" in extract(document, "small")  # what had failed is to come
    capsys.readouterr()
    assert main([*again, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 runs, 4 to come: about 4 min with --jobs 1"


def test_results_that_are_kept_can_be_shown() -> None:
    files = [file for file in (ROOT / "docs" / "tables").glob("*.json") if "cells" in json.loads(file.read_text())]
    assert len(files) >= 3
    for file in files:
        assert "|  |" not in render(json.loads(file.read_text()))  # empty cells, also side by side
