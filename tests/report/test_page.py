"""The page of a run, and the table on the terminal: what they show, and that the page needs nothing but itself."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import pytest
from kept_run import METRICS, QAT, W2, kept_run, metrics_of, write_run
from PIL import Image

from qsam2.evaluation.scoring import headline
from qsam2.recipe import build_recipe
from qsam2.report.compare import render_comparison
from qsam2.report.page import render, results_table, score_rows, versus_text
from qsam2.report.read import SavedRun, read_run

FLOAT_METRICS = {key: METRICS[key] for key in ("float", "bytes")} | {"seconds": {"train": 12.34, "score float": 1.0}}
VOID = {"meta", "link", "img", "source", "br", "input", "hr"}


class Page(HTMLParser):
    """Rows of cells, text, headings, and all that a browser would fetch; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open
        self.text = " ".join(" ".join(self.texts).split())
        self.tags = {tag for tag, _ in self.elements}
        fetched = ("src", "srcset", "poster", "data", "action")
        self.links = [
            attributes[name] or "" for _, attributes in self.elements for name in attributes if name in fetched
        ]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "style" in self._open:
            return
        self.texts.append(text)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += (" " if "small" in self._open else "") + text
        if self._open and re.fullmatch("h[1-6]", self._open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + text)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(kept_run(tmp_path_factory.mktemp("runs") / "qat"))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_headline_has_all_models_with_their_differences(page: Page) -> None:
    rows = {row[0]: row for row in page.rows[1:4]}
    assert [row[0] for row in page.rows[:4]] == ["model", "float", "ptq", "quantized"]
    assert rows["float"] == ["float", "70.0", "69.0", "71.0", "", "16.00"]
    ptq, quantized = rows["ptq"], rows["quantized"]
    assert ptq[1] == "50.0 -20.0 (-24.2 to -15.8)" and ptq[4:6] == ["88.8", "2.50 6.4× smaller"]
    assert quantized[1].startswith("65.0 -5.0 (") and quantized[2].startswith("64.0 -5.0 (")
    assert "weights at 2 bits (lsc), activations in float, trained for 7 steps" in page.text
    assert "on 2 videos, 3 objects of moving_objects, in percent." in page.text
    assert ["packed", "2.50", "6.4×"] in page.rows and ["train", "12.3"] in page.rows
    assert "max_steps: 7" in page.text


def test_the_result_stands_on_top_with_who_made_it_and_how_it_is_used(page: Page) -> None:
    assert [text for _, text in page.headings][:4] == ["qat", "Result", "Tracked clips", "Scores"]
    top = page.text[: page.text.index("Tracked clips")]
    for fact in (
        "Size 6.4× smaller than float32: 2.50 MB instead of 16.00 MB",
        "J&F 65.0 -5.0 (",
        ") against the float model's 70.0: no sure difference",  # two videos
        "Fidelity 88.8 % mean IoU of its masks with the float model's",
        "Training +15.0 (",
        ") against calibration alone: better",
        "Scored on 2 videos, 3 objects of moving_objects",
        "Finished 2026-01-02 03:04 UTC on a processor, Linux, torch 2, with qsam2 0.1.0 (abc1234).",
        "qsam2 predict qat clip.mp4",
        "predictor = qsam2.video_predictor('qat')",
    ):
        assert fact in top, fact
    assert "seconds a frame" not in page.text


def test_how_much_was_scored(tmp_path: Path) -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["float"]["scored"] = {"videos": 2, "frames": 1, "objects": 3}
    page = Page(render(kept_run(tmp_path / "run", QAT, metrics)))
    assert "Scored on 2 videos, 1 frame, 3 objects of moving_objects" in page.text


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-2.0, -0.1, "-1.0 (-2.0 to -0.1) against it: worse"),
        (0.5, 2.0, "-1.0 (+0.5 to +2.0) against it: better"),
        (-2.0, 0.5, "-1.0 (-2.0 to +0.5) against it: no sure difference"),
        (0.0, 0.0, "-1.0 (+0.0 to +0.0) against it: equal"),
        (None, None, "-1.0 against it; one video gives no interval"),
    ],
)
def test_a_difference_in_words(low: float | None, high: float | None, says: str) -> None:
    assert versus_text({"difference": -1.0, "low": low, "high": high}, "it") == says


def test_what_is_not_known_is_left_out() -> None:
    metrics = copy.deepcopy(METRICS)
    del metrics["bytes"]
    row = score_rows(metrics)[2]
    assert not row["MB"] and not row["smaller"]


def test_mean_iou_of_stills_stands_in_the_headline_with_its_difference() -> None:
    metrics = copy.deepcopy(METRICS)
    for index, name in enumerate(("float", "ptq", "quantized")):
        scores = {image: {k: {"box_IoU": 80.0 - 10 * index + k} for k in range(2)} for image in ("a", "b")}
        metrics[name] |= {"box_mIoU": 80.5 - 10 * index, "stills": {"per_object": scores}}
    reference, ptq, quantized = score_rows(metrics)
    assert reference["box_mIoU"] == (80.5, None)
    for row, lost in ((ptq, -10), (quantized, -20)):
        assert row["box_mIoU"][1]["difference"] == pytest.approx(lost)
    assert all("box_mIoU" not in row for row in score_rows(METRICS))
    metrics["ptq"]["protocol"] = "fidelity"  # of data without masks
    assert score_rows(metrics)[1]["versus_fidelity"] == metrics["ptq"]["versus_float"]


def test_the_layers_stand_by_their_noise(page: Page) -> None:
    names = [row[0] for row in page.rows]
    assert names.index("image_encoder.mlp") < names.index("stem") < names.index("attention")
    assert ["image_encoder.mlp", "Linear", "2", "-", "9.5", "12.50", "-", "-", "bits"] in page.rows
    assert ["attention", "Attention", "-", "4", "-", "-", "20.0", "0.00", "bits"] in page.rows


def test_sections_of_a_run_that_has_everything(page: Page) -> None:
    assert [text for _, text in page.headings] == [
        "qat", "Result", "Tracked clips", "Scores", "Where the loss is", "Weights and inputs on their grids",
        "Training", "Memory over time", "Worst frames", "Size and time", "Recipe",
    ]  # fmt: skip
    labels = [attributes["aria-label"] or "" for tag, attributes in page.elements if tag == "svg"]
    assert len(labels) == len(set(labels)) == 7
    assert any("1 of weights end at 7.00 times their start" in label for label in labels)
    assert any("13 of 17 frames of keys were read" in label for label in labels)
    assert any("Signal to noise of the weights of 2 layers" in label for label in labels)
    assert any("The 3 noisiest layers" in label for label in labels)
    assert page.text.count("to float J") == 4 and "squares, frame 1: ptq to float J" in page.text
    for absent in ("What was fitted", "Calibrated weights", "Smoothed LayerNorms", "Rounded weights", "Reconstructed"):
        assert absent not in page.text


def test_a_calibrated_run_and_a_float_run(tmp_path: Path) -> None:
    calibrated = Page(render(kept_run(tmp_path / "ptq", W2)))
    assert "activations in float, calibrated only, seed 0." in calibrated.text
    trained = Page(render(kept_run(tmp_path / "float", {"train": {}}, FLOAT_METRICS)))
    assert "SAM 2.1 nano, trained for 2000 steps" in trained.text
    assert [row[0] for row in trained.rows] == ["model", "float", "format", "float32", "bfloat16", "packed", "stage",
                                                "train", "score float"]  # fmt: skip
    for absent in ("Where the loss is", "Memory over time", "difference to the float", "ptq", "not finished"):
        assert absent not in trained.text.replace("ptq_", "")
    assert "frame, truth, float, and their difference" in trained.text
    assert "SAM 2.1 nano, not trained" in Page(render(kept_run(tmp_path / "as_is", {}, FLOAT_METRICS))).text


def test_sensitivity_of_the_run_is_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    measured = (("neck", "weights", 1.5), ("trunk", "weights", 9.0), ("neck", "activations", 3.0))
    rows = [{"group": group, "part": part, "bits": 2, "loss": loss} for group, part, loss in measured]
    (path / "sensitivity.json").write_text(json.dumps({"groups": rows}))
    page = render(read_run(path))
    assert "Fidelity lost by quantizing each of 2 groups alone, at worst; most by trunk 9.0, neck 3.0" in page
    (path / "sensitivity.json").write_text(json.dumps({"groups": []}))
    assert "Fidelity lost" not in render(read_run(path))


def test_what_calibration_and_reconstruction_fitted(tmp_path: Path) -> None:
    norm = {"readers": ["qkv", "proj"], "range_over_mean": [8.04, 2.0]}
    calibrated = {"bits": 4, "strength": 0.1, "inputs": 6, "rank": 5, "condition_number": 1234.0, "std": [0.5, 0.25],
                  "max_over_std": [9.0, 4.5], "float_error": 0.001, "quantized_error": [0.02, 0.01]}  # fmt: skip
    fitted = {
        "calibrated_weights": {"method": "frobenius", "layers": {"fc1": calibrated}},
        "smoothed": {
            "norm1": {**norm, "alpha": 0.5, "error": [0.02, 0.01]},
            "norm2": {**norm, "alpha": None, "error": None},
        },
        "rounded": {
            "method": "gptq",
            "layers": {"qkv": {"bits": 4, "inputs": 8, "error": [0.03, 0.0012], "damping": 0.03}},
        },
        "reconstruction": {
            "complete": False, "total": 3, "video": None,
            "blocks": [
                {"name": "blocks.0", "calls": 4, "error": [0.1, 0.05], "kept": True, "flipped": 0.125},
                {"name": "blocks.1", "calls": 4, "error": [0.1, 0.1], "kept": False, "flipped": 0.0},
            ],
        },
    }  # fmt: skip
    page = Page(render(kept_run(tmp_path / "fitted", QAT, {**METRICS, **fitted})))
    assert "Least Frobenius norm (strength is ρ); strength chosen on held-out clips" in page.text
    assert ["fc1", "4", "0.1", "2.00 → 1.00", "0.10", "9 → 4.5", "0.5 → 0.25", "1e+03", "5/6"] in page.rows
    assert ["norm1", "qkv, proj", "0.5", "8.0 → 2.0", "2.00 → 1.00"] in page.rows
    assert ["norm2", "qkv, proj", "not smoothed", "8.0 → 2.0", ""] in page.rows
    assert ["qkv", "4", "0.03", "3.00 → 0.12"] in page.rows
    assert "2 of 3 blocks, stopped early: the rest is as calibration made it." in page.text
    assert ["blocks.0", "10.00 → 5.00", "12.5 %", "fitted"] in page.rows
    assert ["blocks.1", "10.00 → 10.00", "0.0 %", "as before"] in page.rows


def test_the_page_needs_nothing_but_itself(page: Page, html: str) -> None:
    assert page.tags.isdisjoint({"script", "iframe", "object", "base"})
    assert all(link.startswith(("data:image/jpeg;base64,", "data:video/mp4;base64,")) for link in page.links)
    rest = re.sub(r'data:[^"]*|xmlns(:\w+)?="[^"]*"|<!DOCTYPE svg[^>]*>', "", html)
    assert not re.search(r"https?:|//|url\((?!#)|@import", rest)


def test_pictures_and_film_can_be_read(page: Page) -> None:
    films = [link for link in page.links if link.startswith("data:video/mp4")]
    assert len(films) == 1
    with av.open(io.BytesIO(base64.b64decode(films[0].split(",")[1]))) as film:
        stream = film.streams.video[0]
        frames = list(film.decode(stream))
        assert len(frames) == 8 and stream.codec_context.name == "h264" and frames[0].format.name == "yuv420p"
    pictures = [link for link in page.links if link.startswith("data:image/jpeg")]
    assert len(pictures) == 4  # poster, the picture for browsers that play nothing, two worst frames
    for link in pictures:
        with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as picture:
            assert picture.size == (frames[0].width, frames[0].height)


def test_the_page_can_be_read_by_all(page: Page, html: str) -> None:
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(new <= old + 1 for old, new in zip(levels, levels[1:], strict=False))
    assert {"header", "main", "section", "figure", "figcaption", "caption"} <= page.tags
    by_tag: dict[str, list[dict[str, str | None]]] = {}
    for tag, attributes in page.elements:
        by_tag.setdefault(tag, []).append(attributes)
    assert all(cell.get("scope") in ("row", "col") for cell in by_tag["th"])
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in by_tag["svg"])
    assert all(picture["alt"] for picture in by_tag["img"])
    assert all("controls" in video and "autoplay" not in video and video["aria-label"] for video in by_tag["video"])
    scrolled = [each for each in by_tag["div"] if each.get("class") == "wide"]
    assert scrolled and all(each["tabindex"] == "0" and each["aria-label"] for each in scrolled)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = {attributes["aria-labelledby"] for _, attributes in page.elements if attributes.get("aria-labelledby")}
    assert targets <= set(ids)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {first or second for first, second in used} <= set(ids)


def test_colours_are_told_apart_on_both_grounds(html: str) -> None:
    """Text has a contrast of 4.5 to 1 at least, lines of 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    schemes = re.findall(r":root \{([^}]*)\}", html)
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", scheme))
        for name, colour in colours.items():
            if name not in ("page", "line"):
                least = 4.5 if name in ("text", "quiet") else 3.0
                assert contrast(colour, colours["page"]) >= least, (name, colour, colours["page"])


def contrast(first: str, second: str) -> float:
    lights = sorted((luminance(colour) for colour in (first, second)), reverse=True)
    return (lights[0] + 0.05) / (lights[1] + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_are_escaped(tmp_path: Path) -> None:
    values = {**QAT, "data": {"val": "davis:<script>alert('x')</script>&amp;:val"}}
    html = render(kept_run(tmp_path / "run", values, {**METRICS, "seconds": {**METRICS["seconds"], "<b>": 1.0}}))
    page = Page(html)
    assert page.tags.isdisjoint({"script", "b", "all"})
    assert "davis:<script>alert('x')</script>&amp;:val" in page.text
    assert ["stem", "Conv2d", "8", "8", "40.0", "0.00", "35.0", "1.00", "reads <all>"] in page.rows
    assert ["<b>", "1.0"] in page.rows


NAMES = ("$$", "cost $a_1$", r"$\alpha", r"a\$b", "_hidden", "run #000000", "<b>&amp;", "\udcff")
"""Formulas, entities, colours and names that are no text, as names of folders, videos and groups of layers."""


def test_any_name_is_shown_as_it_is(tmp_path: Path) -> None:
    made = write_run(tmp_path / "made")
    rows = [{"group": name, "part": "weights", "bits": 2, "loss": 1.0} for name in NAMES]
    (made / "sensitivity.json").write_text(json.dumps({"groups": rows}))
    clips = json.loads((made / "report" / "clips.json").read_text())
    clips["clips"] *= len(NAMES)
    clips["clips"] = [{**clip, "video": name} for clip, name in zip(clips["clips"], NAMES, strict=True)]
    (made / "report" / "clips.json").write_text(json.dumps(clips))
    for index, name in enumerate(NAMES):
        shutil.copytree(made, tmp_path / f"{index}" / name)
    folders = [read_run(tmp_path / f"{index}" / name) for index, name in enumerate(NAMES)]
    for page, captions in ((render(read_run(made)), "figcaption"), (render_comparison(folders), "th")):
        drawn = "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL))
        for name in NAMES:
            shown = escape(name.replace("\udcff", "?"), quote=False)
            assert f">{shown}<" in drawn, name
            assert re.search(rf"<{captions}[^>]*>{re.escape(shown)}", page), name


def test_pictures_outside_of_the_folder_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kept_run(tmp_path / "run")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "run" / "report" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert run.media("clip0.jpg")
    for name in ("../../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "../metrics.json"):
        assert run.media(name) is None
    monkeypatch.setattr("qsam2.report.read.MAX_MEDIA_BYTES", 100)
    assert run.media("clip0.jpg") is None, "nor are those beyond all use"


def test_the_page_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    values = {**QAT, "data": {"root": "/home/me/data", "val": "davis:/home/me/DAVIS:val", "train": ["sav:~/sav"]},
              "model": {"checkpoint": "/home/me/tiny.pt"}, "evaluate": {"float_cache": "/home/me/cache"}}  # fmt: skip
    html = render(kept_run(tmp_path / "run", values))
    assert "/home/me" not in html and "~/" not in html and str(tmp_path) not in html
    assert "of davis:DAVIS:val" in html and "checkpoint: tiny.pt" in html


def test_curves_that_diverged_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "curves/version_0/metrics.csv").write_text("step,loss\n1,2.0\n2,1.0\n3,nan\n4,inf\n")
    assert "Loss from 2.00 to 1.00 over 2 logged steps" in render(read_run(path))


def test_an_unfinished_run_says_what_is_to_come(tmp_path: Path) -> None:
    metrics = metrics_of(float=70.0, ptq=50.0)
    del metrics["bytes"], metrics["seconds"]["train"], metrics["seconds"]["score quantized"]
    path = write_run(tmp_path / "run", QAT, metrics)
    page = Page(render(read_run(path)))
    assert "not finished: train, score quantized are to come" in page.text
    assert [row[0] for row in page.rows[:3]] == ["model", "float", "ptq"]
    metrics["seconds"] |= {"train": 1.0, "score quantized": 1.0}
    (path / "metrics.json").write_text(json.dumps(metrics))
    assert "not finished: writing the model is to come" in Page(render(read_run(path))).text


MINMAX = {"method": "minmax", "bits": 4, "range": "minmax"}


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        (
            {
                "quantize": {"weights": MINMAX, "activations": MINMAX, "allocate": {}},
                "calibrate": {"weights": "frobenius", "smooth": [0.5], "rounding": "gptq"},
                "reconstruct": {"method": "brecq"},
                "evaluate": {"stills": "coco:x:val"},
            },
            "allocate bits, calibrate weights, smooth, convert, score float, score float on stills, calibrate, "
            "round weights, reconstruct, score ptq, score ptq on stills",
        ),
        (
            {**W2, "train": {}, "evaluate": {"after_calibration": False}},
            "convert, score float, calibrate, train, score quantized",
        ),
        ({"train": {}}, "train, score float"),
        ({}, "score float"),
        ({**W2, "data": {"val": "video:film.mp4"}}, "prompt, convert, score float, calibrate, score ptq"),
    ],
)
def test_the_stages_to_come_are_those_of_the_recipe(values: dict[str, Any], stages: str) -> None:
    assert SavedRun(Path("run"), build_recipe(values)).missing_stages == stages.split(", ")


@pytest.mark.parametrize(
    ("values", "metrics", "says", "silent"),
    [
        (
            {**QAT, "calibrate": {"weights": "frobenius"}},
            None,  # it has just begun
            [
                "not finished: calibrate weights, convert, score float, calibrate, score ptq, train, score quantized",
            ],
            "Scores",
        ),
        (W2, METRICS, ["Scores", "Size and time"], "Where the loss is"),  # by an older version
    ],
)
def test_a_run_that_kept_nothing(tmp_path: Path, values: Any, metrics: Any, says: list[str], silent: str) -> None:
    path = write_run(tmp_path / "run", values, metrics)
    for file in [*(path / "report").iterdir(), *path.glob("curves/*/*")]:
        file.unlink()
    text = Page(render(read_run(path))).text
    assert all(said in text for said in says) and silent not in text


def test_table_on_the_terminal() -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["quantized"]["versus_float"] = {"difference": -5.0, "low": -6.0, "high": -4.0}
    del metrics["quantized"]["versus_ptq"]
    lines = results_table(metrics).splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["float", "70.0", "69.0", "71.0"],
        ["ptq", "50.0", "49.0", "51.0"],
        ["quantized", "65.0", "64.0", "66.0"],
    ]
    assert lines[3].endswith("-5.0 (-6.0 to -4.0)      88.8")
    assert len({len(line.rstrip()) for line in (lines[0], lines[2], lines[3])}) == 1  # columns end together
    assert lines[4] == "differences: 95 % t interval over 2 videos, 3 objects"
    assert lines[5] == "float32 16.00 MB  bfloat16 8.00 MB  packed 2.50 MB"
    assert len(results_table(FLOAT_METRICS).splitlines()) == 3
    more = {"versus_ptq": {"difference": 3.0, "low": 1.0, "high": 5.25}, "box_mIoU": 60.0, "prompts": "own masks"}
    metrics["quantized"] |= more
    assert results_table(metrics).splitlines()[4:8] == [
        "prompts: own masks; fidelity is the mask IoU with the float model",
        "quantized against ptq: +3.0 (+1.0 to +5.2), 95 % interval",
        "differences: 95 % t interval over 2 videos, 3 objects",
        "mIoU of masks from a box: quantized 60.0",
    ]


def test_line_on_the_terminal() -> None:
    scores = {"J&F": 0.0, "J": 49.96, "F": 51.0}
    assert headline({**scores, "fidelity": None}) == "J&F 0.0, J 50.0, F 51.0"
    assert headline({**scores, "fidelity": 0.0}) == "J&F 0.0, J 50.0, F 51.0, fidelity 0.0"
    assert headline({"box_mIoU": 20.0, "point_mIoU": 10.0, "fidelity": None}) == "point_mIoU 10.0, box_mIoU 20.0"


def test_a_diverged_loss_is_drawn_up_to_where_it_diverged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (file,) = run.glob("curves/version_0/metrics.csv")
    losses = [4.0, 3.0, 2.0, 2.0, 2.0, "nan", "inf", "1e300"]
    file.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in enumerate(losses, 1)))
    read = read_run(run)
    assert max(step for step, _ in read.curves["loss"]) == 5
    assert "over 5 logged steps" in render(read)
