"""The page of a run, and the table on the terminal: what they show, and that the page needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qsam2.layers.convert import ConvertedLayer
from qsam2.recipe import Recipe, build_recipe
from qsam2.report.page import render, write_report
from qsam2.report.table import results_table, score_line
from qsam2.run_folder import RunFolder

LAYERS = [
    ConvertedLayer("stem", "Conv2d", 8, 8, "reads <all>"),
    ConvertedLayer("attention", "Attention", None, 4, "bits"),
    ConvertedLayer("head", "Linear", None, None, "the recipe's rule"),
]
QUANTIZED = {"quantize": {"weights": {"method": "lsc", "bits": 2}}, "train": {}, "trainer": {"max_steps": 7}}


def block(score: float, **more: Any) -> dict[str, Any]:
    objects = {"cat": {"1": {"J&F": score}, "2": {"J&F": score}}, "dog": {"1": {"J&F": score}}}
    return {"J&F": score, "J": score - 1, "F": score + 1, "seconds_per_frame": 0.1234, "per_object": objects, **more}


def versus(difference: float) -> dict[str, Any]:
    return {
        "versus_float": {"difference": difference, "low": difference - 1, "high": difference + 1},
        "fidelity": 88.84,
    }


METRICS = {
    "float": block(70.0),
    "ptq": block(50.0, **versus(-20.0)),
    "quantized": block(65.0, **versus(-5.0)),
    "bytes": {"float32": 16_000_000, "bfloat16": 8_000_000, "packed": 2_500_000},
    "seconds": {"train": 12.34, "score float": 1.0},
}
FLOAT_METRICS = {key: METRICS[key] for key in ("float", "bytes", "seconds")}


class Page(HTMLParser):
    """Rows of cells, text, and all that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self._in_cell = False
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, text: str) -> None:
        self.texts.append(text)
        if self._in_cell:
            self.rows[-1][-1] += text


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


def page_of(recipe: Recipe, metrics: dict[str, Any], layers: list[ConvertedLayer], *pictures: Image.Image) -> Page:
    return Page(render(metrics, recipe, layers, pictures))


def test_a_quantized_run_shows_all_three_models() -> None:
    page = page_of(build_recipe(QUANTIZED), METRICS, LAYERS, picture())
    assert ["float", "70.0", "69.0", "71.0", "", "", "0.123"] in page.rows
    assert ["ptq", "50.0", "49.0", "51.0", "-20.0 (-21.0 to -19.0)", "88.8", "0.123"] in page.rows
    assert ["quantized", "65.0", "64.0", "66.0", "-5.0 (-6.0 to -4.0)", "88.8", "0.123"] in page.rows
    assert ["packed", "2.50", "6.4×"] in page.rows
    assert ["train", "12.3"] in page.rows
    assert ["attention", "Attention", "-", "4", "bits"] in page.rows
    assert "weights at 2 bits (lsc), activations in float, trained for 7 steps" in page.text
    assert "on 2 videos with 3 objects of moving_objects, in percent. Differences are to the float model" in page.text
    assert "max_steps: 7" in page.text


def test_a_calibrated_run_and_a_float_run() -> None:
    calibrated = page_of(build_recipe({"quantize": QUANTIZED["quantize"]}), METRICS, LAYERS)
    assert "activations in float, calibrated only; qsam2" in calibrated.text
    trained = page_of(build_recipe({"train": {}}), FLOAT_METRICS, [])
    assert "SAM 2.1 nano, trained for 2000 steps" in trained.text
    assert [row[0] for row in trained.rows] == ["model", "float", "format", "float32", "bfloat16", "packed", "stage",
                                                "train", "score float"]  # fmt: skip
    for absent in ("Layers", "Tracked frames", "Differences", "ptq"):
        assert absent not in trained.text.replace("ptq_", "")
    assert "SAM 2.1 nano, not trained" in page_of(build_recipe({}), FLOAT_METRICS, []).text


def test_what_calibration_and_reconstruction_fitted() -> None:
    norm = {"readers": ["qkv", "proj"], "range_over_mean": [8.04, 2.0]}
    fitted = {
        "smoothed": {
            "norm1": {**norm, "alpha": 0.5, "error": [0.02, 0.01]},
            "norm2": {**norm, "alpha": None, "error": None},
        },
        "rounded": {"method": "gptq", "layers": {"qkv": {"bits": 4, "inputs": 8, "error": [0.03, 0.0012]}}},
        "reconstruction": {
            "complete": False, "total": 3, "video": None,
            "blocks": [
                {"name": "blocks.0", "calls": 4, "error": [0.1, 0.05], "kept": True, "flipped": 0.125},
                {"name": "blocks.1", "calls": 4, "error": [0.1, 0.1], "kept": False, "flipped": 0.0},
            ],
        },
    }  # fmt: skip
    page = page_of(build_recipe(QUANTIZED), {**METRICS, **fitted}, LAYERS)
    assert ["norm1", "qkv, proj", "0.5", "8.0 → 2.0", "2.00 → 1.00"] in page.rows
    assert ["norm2", "qkv, proj", "not smoothed", "8.0 → 2.0", ""] in page.rows
    assert ["qkv", "4", "3.00 → 0.12"] in page.rows
    assert "2 of 3 blocks, stopped early: the rest is as calibration made it." in page.text
    assert ["blocks.0", "10.00 → 5.00", "12.5 %", "fitted"] in page.rows
    assert ["blocks.1", "10.00 → 10.00", "0.0 %", "nearest"] in page.rows
    without = page_of(build_recipe(QUANTIZED), METRICS, LAYERS).text
    for absent in ("Smoothed LayerNorms", "Rounded weights", "Reconstructed blocks"):
        assert absent not in without


def test_the_page_needs_nothing_but_itself() -> None:
    html = render(METRICS, build_recipe(QUANTIZED), LAYERS, [picture(), picture("blue")])
    page = Page(html)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert len(page.links) == 2 and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"data:[^\"]*", "", html))
    for link, colour in zip(page.links, ((254, 0, 0), (0, 0, 254)), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as shown:
            assert shown.size == (40, 30) and shown.getpixel((5, 5)) == colour


def test_names_are_escaped() -> None:
    recipe = build_recipe({**QUANTIZED, "data": {"val": "davis:<script>alert('x')</script>&amp;:val"}})
    html = render({**METRICS, "seconds": {"<b>": 1.0}}, recipe, LAYERS, [])
    page = Page(html)
    assert page.tags.isdisjoint({"script", "b", "all"})
    assert "davis:<script>alert('x')</script>&amp;:val" in page.text
    assert ["stem", "Conv2d", "8", "8", "reads <all>"] in page.rows and ["<b>", "1.0"] in page.rows


def test_it_is_written_into_the_run_folder(tmp_path: Path) -> None:
    recipe = build_recipe({**QUANTIZED, "name": "mine", "output": str(tmp_path / "run")})
    folder = RunFolder(recipe)
    folder.metrics = json.loads(json.dumps(METRICS))
    assert not folder.finished
    write_report(folder, recipe, LAYERS, [picture()])
    assert folder.finished and "<title>mine - qsam2</title>" in (tmp_path / "run/report.html").read_text()


def test_table_on_the_terminal() -> None:
    lines = results_table(METRICS).splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["float", "70.0", "69.0", "71.0"],
        ["ptq", "50.0", "49.0", "51.0"],
        ["quantized", "65.0", "64.0", "66.0"],
    ]
    assert lines[3].endswith("-5.0 (-6.0 to -4.0)      88.8")
    assert len({len(line.rstrip()) for line in (lines[0], lines[2], lines[3])}) == 1  # columns end together
    assert lines[4] == "float32 16.00 MB  bfloat16 8.00 MB  packed 2.50 MB"
    assert len(results_table(FLOAT_METRICS).splitlines()) == 3


def test_table_compares_training_with_calibration() -> None:
    block = {"J&F": 50.0, "J": 50.0, "F": 50.0, "versus_ptq": {"difference": 3.0, "low": 1.0, "high": 5.25}}
    table = results_table({"quantized": block, "bytes": {}})
    assert "quantized against ptq: +3.0 (+1.0 to +5.2), 95 % interval" in table


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"J&F": 50.0, "J": 49.96, "F": 51.0, "fidelity": None}, "m: J&F 50.0, J 50.0, F 51.0"),
        ({"J&F": 0.0, "J": 0.0, "F": 0.0, "fidelity": 0.0}, "m: J&F 0.0, J 0.0, F 0.0, fidelity 0.0"),
        ({"point_mIoU": 10.0, "box_mIoU": 20.0, "fidelity": None}, "m: point_mIoU 10.0, box_mIoU 20.0"),
    ],
)
def test_line_on_the_terminal(more: dict[str, Any], line: str) -> None:
    assert score_line({"model": "m", **more}) == line
