"""Figures of a report, and the training curves they are drawn from."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kept_run import layers

from qsam2.errors import UserError
from qsam2.report.draw import (
    Point,
    _label,
    draw_clips,
    draw_histograms,
    draw_loss,
    draw_noise,
    draw_pareto,
    draw_worst,
    new_figure,
    pareto_front,
)
from qsam2.report.read import read_curves


def label(svg: str | None) -> str:
    """The description of a figure that can be parsed."""
    assert svg is not None
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("role") == "img"
    return str(root.get("aria-label"))


def row(name: str = "trunk", levels: tuple[int, int] = (-2, 1)) -> dict[str, Any]:
    after = [0.0] * 19 + [0.75] + [0.0] * 19 + [0.25]
    reach = [levels[0] - 2.0, levels[1] + 2.0]
    return {"layer": name, "bits": 2, "levels": list(levels), "reach": reach, "before": [0.025] * 40, "after": after}


def grid_lines(svg: str) -> int:
    return len(re.findall(r'd="M ([\d.]+) [\d.]+ \s*L \1 [\d.]+ \s*" [^>]*stroke-dasharray[^>]*var\(--green', svg))


def test_histograms_stand_on_their_grid_of_which_many_levels_are_drawn_as_their_ends() -> None:
    svg = draw_histograms([row(f"layer{index}") for index in range(3)], "weights")
    assert "Histograms of the weights of 3 layers" in label(svg)
    assert "beyond the grid: layer0 25.00%, layer1 25.00%" in label(svg)
    assert grid_lines(svg) == 3 * 4
    assert all(f"layer{index}, 2 bits" in svg for index in range(3))
    assert grid_lines(draw_histograms([row(levels=(0, 255))], "inputs")) == 2


def test_a_long_name_goes_on_below_and_keeps_all_its_letters() -> None:
    name = "mask_decoder.transformer.layers.1.cross_attn_image_to_token.v_proj"
    svg = draw_histograms([row(name), row("short.name")], "inputs")
    shown = ["".join(text.itertext()).strip() for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "short.name, 2 bits" in shown and f"{name}, 2 bits" not in shown
    halves = [text for text in shown if text and text in f"{name}, 2 bits" and len(text) > 20]
    assert "".join(halves) == f"{name}, 2 bits"


def test_a_figure_has_text_in_the_colour_around_it() -> None:
    svg = draw_histograms([row("<script>")], "inputs")
    assert "<text" in svg and "#000000" not in svg and "currentColor" in svg
    assert "<script>" not in svg and "&lt;script&gt;" in svg


def test_layers_are_drawn_by_their_noise() -> None:
    rows = layers()["layers"]
    noise, worst = draw_noise(rows), draw_worst(rows)
    assert "2 layers: from 9.5 dB (image_encoder.mlp) to 40.0 dB, 24.8 dB in the median" in label(noise)
    assert "first image_encoder.mlp 9.5 dB, attention 20.0 dB, stem 35.0 dB" in label(worst)
    assert worst.index("image_encoder.mlp  2/-") < worst.index("attention  -/4") < worst.index("stem  8/8")
    silent = [row for row in rows if row["name"] == "head"]
    assert draw_noise(silent) is None and draw_worst(silent) is None


@pytest.mark.parametrize(
    ("losses", "described", "lines"),
    [
        ([10 - step / 10 for step in range(1, 60)], "Loss from 9.40 to 4.60 over 59 logged steps", "mean of 11"),
        ([float(step) for step in range(25)], "Loss from 2.00 to 22.00 over 25 logged steps", "mean of 5"),
        ([3.0, 1.0], "Loss from 3.00 to 1.00 over 2 logged steps", None),
    ],
)
def test_the_loss_is_drawn_with_a_mean_that_does_not_hide_a_short_course(
    losses: list[float], described: str, lines: str | None
) -> None:
    svg = draw_loss({"loss": list(enumerate(losses))})
    assert label(svg) == described and "logged steps" in svg
    assert lines in svg if lines else "mean of" not in svg
    assert draw_loss({"loss": [(1, 2.0)]}) is None and draw_loss({}) is None


def test_losses_of_several_runs_stand_in_one_picture() -> None:
    runs = {name: [(1, 2.0), (2, end)] for name, end in (("a&b", 1.0), ("c", 0.5), ("short", 0.0))}
    svg = draw_loss(runs | {"e": []})
    assert label(svg).startswith("Loss a&b: from 2.00 to 1.00 over 2 logged steps; c: from 2.00")
    assert "a&amp;b" in svg and "var(--blue" in svg and "var(--orange" in svg


def test_clips_are_drawn_relative_to_their_start() -> None:
    curves = {
        "loss": [(1, 1.0), (2, 1.0)],
        "scale/a.weight_quantizer": [(1, 0.5), (2, 1.0)],
        "scale/b.weight_quantizer": [(1, 0.1), (2, 0.1)],
        "scale/a.input_quantizer": [(1, 2.0), (2, 1.0)],
        "scale/once.input_quantizer": [(1, 2.0)],
    }
    described = label(draw_clips(curves))
    assert "2 of weights end at 1.50 times their start in the median (1.10 to 1.90 for 80 %)" in described
    assert "1 of inputs end at 0.50 times" in described
    assert draw_clips({"loss": curves["loss"]}) is None
    assert "of inputs" not in label(draw_clips({name: curves[name] for name in curves if "weight" in name}))


@given(st.lists(st.builds(Point, st.just("p"), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_front_holds_what_no_other_beats(points: list[Point]) -> None:
    def beaten(point: Point) -> bool:
        own = point.cost, -point.score
        return any((p.cost, -p.score) != own and p.cost <= point.cost and p.score >= point.score for p in points)

    front = pareto_front(points)
    assert {(point.cost, point.score) for point in front} == {(p.cost, p.score) for p in points if not beaten(p)}
    assert [point.cost for point in front] == sorted({point.cost for point in front})


def test_a_single_point_is_drawn() -> None:
    assert "of 1 models; Pareto front: a 50.0 at 1" in draw_pareto([Point("a", 1.0, 50.0)], "MB")


def test_labels_of_models_that_lie_on_one_another_can_be_read() -> None:
    points = [Point(f"a rather long label {index}", 1.0 + 1e-3 * index, 50.0 + 0.1 * index) for index in range(6)]
    _, axes = new_figure(8, 3.6)
    axes.scatter([point.cost for point in points], [point.score for point in points])
    axes.set(xlim=(0, 4), ylim=(0, 100))
    labels = _label(axes, points)
    assert sorted(label.get_text() for label in labels) == [point.label for point in points]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


def write(folder: Path, version: int | str, text: str) -> None:
    (folder / f"version_{version}").mkdir()
    (folder / f"version_{version}" / "metrics.csv").write_text(text)


def test_a_resumed_run_reads_as_one_curve_and_the_later_values_win(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,loss,lr\n10,5.0,\n10,,0.1\n20,4.0,\n30,9.0,\n")
    write(tmp_path, 10, "lr,step,loss\n,30,3.0\n,40,2.0\nnan,40,inf\n")
    write(tmp_path, 9, "step,loss\n30,8.0\n")
    write(tmp_path, "copy", "step,loss\n30,7.0\n")  # not a run's
    assert read_curves(tmp_path) == {"loss": [(10, 5.0), (20, 4.0), (30, 3.0), (40, 2.0)], "lr": [(10, 0.1)]}
    assert read_curves(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    "text", ["step,loss\n1,x\n", "loss\n1\n", "step,loss\n1,2,3\n", "step,loss\n-1,2\n", f"step,loss\n{2**53},2\n"]
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, 0, text)
    with pytest.raises(UserError, match=r"version_0.metrics.csv is damaged \(.*remove it"):
        read_curves(tmp_path)
