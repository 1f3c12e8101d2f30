"""Several runs on one page, and `qsam2 report` on the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from kept_run import METRICS, QAT, W2, kept_run, metrics_of, write_run
from messages import Message
from test_page import Page

from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.report.compare import recipe_differences, render_comparison, unique_names
from qsam2.report.read import SavedRun


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[SavedRun]:
    folder = tmp_path_factory.mktemp("runs")
    ptq = metrics_of(float=70.0, ptq=50.0, quantized=50.0)
    ptq["bytes"]["packed"] = 2_000_000
    return [kept_run(folder / "qat", QAT), kept_run(folder / "ptq", W2, ptq)]


@pytest.fixture(scope="module")
def page(runs: list[SavedRun]) -> Page:
    return Page(render_comparison(runs))


def test_the_table_has_a_row_a_run(page: Page) -> None:
    qat, ptq = page.rows[1:3]
    assert qat[:5] == ["qat", "nano", "2 (lsc)", "float", "7"] and qat[6:8] == ["64.0", "66.0"]
    assert qat[5].startswith("65.0 -5.0 (") and qat[5].endswith(") float 70.0 calibrated 50.0")
    assert qat[8:] == ["88.8", "2.50 6.4× smaller"]
    assert ptq[:5] == ["ptq", "nano", "2 (lsc)", "float", "-"] and ptq[5].startswith("50.0 -20.0 (")
    assert "calibrated" not in ptq[5], "that is the model which it ships"
    assert ptq[9] == "2.00 8.0× smaller"
    assert [text for _, text in page.headings] == [
        "2 runs compared", "Scores", "Accuracy against size", "Training", "What the recipes differ in",
    ]  # fmt: skip
    assert page.tags.isdisjoint({"script", "iframe"})


def test_the_front_is_drawn_over_bytes(page: Page) -> None:
    labels = [str(attributes["aria-label"]) for tag, attributes in page.elements if tag == "svg"]
    front = "J&F against MB of 3 models; Pareto front: ptq 50.0 at 2, qat 65.0 at 2.5, float nano 70.0 at 16"
    assert labels[0] == front


def test_only_keys_that_differ_are_listed(runs: list[SavedRun], page: Page) -> None:
    differences = recipe_differences({run.name: run for run in runs})
    assert differences["memory.sharing"] == ["adaptive", "none"]
    assert differences["trainer.max_steps"] == [7, 2000]
    assert differences["train"] == ["given", None] and "train.lr" not in differences
    assert not {"name", "output", "seed", "quantize.weights.bits"} & differences.keys()
    assert ["memory.sharing", "adaptive", "none"] in page.rows
    twin = SavedRun(runs[0].path.parent / "twin", runs[0].recipe, runs[0].metrics)
    assert "In nothing: the recipes are the same" in render_comparison([runs[0], twin])


def test_a_part_that_is_left_out_is_named_by_its_method(tmp_path: Path) -> None:
    settings = [{**W2, "calibrate": {"weights": weights}} for weights in ("frobenius", "acnr", None)]
    runs = {str(index): kept_run(tmp_path / str(index), values) for index, values in enumerate(settings)}
    differences = recipe_differences(runs)
    assert differences["calibrate.weights"] == ["frobenius", "acnr", None]
    assert differences["calibrate.weights.method"] == ["frobenius", "acnr", None]
    assert all(len(values) == 3 for values in differences.values())


def test_runs_that_were_scored_on_other_data(tmp_path: Path, runs: list[SavedRun], page: Page) -> None:
    assert "cannot be compared" not in page.text
    other = kept_run(tmp_path / "other", {**W2, "evaluate": {"frames": 5}})
    text = Page(render_comparison([runs[0], other])).text
    assert "cannot be compared: qat: moving_objects" in text and "all videos, 5 frames" in text


def test_an_unfinished_run_among_others(tmp_path: Path, runs: list[SavedRun]) -> None:
    begun = kept_run(tmp_path / "begun", W2, None)
    page = Page(render_comparison([*runs, begun]))
    assert "begun is not finished: convert, score float, calibrate, score ptq are to come" in page.text
    assert page.rows[3][0] == "begun" and page.rows[3][-1] == "not scored yet"
    with pytest.raises(UserError, match="begun, begun2: none of these runs has scores yet; finish one"):
        render_comparison([begun, kept_run(tmp_path / "begun2", W2, None)])


def test_runs_of_one_name_are_named_by_their_paths(tmp_path: Path, runs: list[SavedRun]) -> None:
    first, second = (SavedRun(tmp_path / folder / "run", runs[0].recipe) for folder in "ab")
    assert list(unique_names([first, second])) == ["a/run", "b/run"]


def test_headings_have_something_below_them_and_folders_stay_at_home(tmp_path: Path) -> None:
    """Without masks there is no J&F, without bytes no size: neither has a column or a section."""
    metrics: dict[str, Any] = copy.deepcopy(METRICS)
    del metrics["bytes"]
    for name in ("float", "ptq", "quantized"):
        for key in ("J&F", "J", "F"):
            del metrics[name][key]
        metrics[name]["protocol"] = "fidelity"
    homes = {**W2, "data": {"root": "/home/me/data", "val": "davis:/home/me/DAVIS:val"}}
    paths = [tmp_path / name / "run" for name in ("first", "second")]
    pair = [kept_run(path, values, metrics) for path, values in zip(paths, (homes, W2), strict=True)]
    html = render_comparison(pair)
    page = Page(html)
    assert page.rows[0] == ["run", "model", "weights", "activations", "fidelity"]
    assert [text for _, text in page.headings] == ["2 runs compared", "Scores", "What the recipes differ in"]
    assert ["data.val", "davis:DAVIS:val", "-"] in page.rows and "davis:DAVIS:val, davis protocol" in page.text
    assert "/home/me" not in html and str(tmp_path) not in html


def test_report_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "run")
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    assert "<title>run - qsam2</title>" in (path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_bytes() == (path / "report.html").read_bytes()


def test_report_of_an_unfinished_run_does_not_mark_it_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run", QAT, {"seconds": {"convert": 1.0}})
    assert main(["report", str(path)]) == 0
    assert (path / "unfinished.html").is_file()
    assert main(["report", str(path), "--out", str(path / "report.html")]) == 2
    assert "that run is not finished, and this file says that it is; give another path" in capsys.readouterr().err
    assert not (path / "report.html").exists()


def test_report_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(write_run(tmp_path / name, W2, METRICS)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *paths]) == 0
    assert "<title>2 runs - qsam2</title>" in Path("comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["absent"], "absent"),
        (["run", "absent"], "absent"),
        (["run", "run"], "run is given twice"),
        (["."], "recipe.yaml"),
        (["run", "--out", "run"], "--out run"),
        (["run", "--out", "file/page.html"], "could not be written"),
        (["run", "seed=1"], "seed=1"),
        ([], "RUN"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fact: str,
    message: Message,
) -> None:
    write_run(tmp_path / "run", W2)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    text = message(capsys.readouterr().err)
    assert fact in text and text.startswith("error: ")
