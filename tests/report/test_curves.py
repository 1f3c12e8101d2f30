"""Curves that training logged: read as one, and drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from qsam2.errors import UserError
from qsam2.report.draw import draw_clips, draw_loss
from qsam2.report.read import read_curves


def write(folder: Path, version: int, text: str) -> None:
    place = folder / f"version_{version}"
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(text)


def test_a_resumed_run_reads_as_one_curve_and_the_later_values_win(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,loss,lr\n10,5.0,\n10,,0.1\n20,4.0,\n30,9.0,\n")
    write(tmp_path, 10, "lr,step,loss\n,30,3.0\n,40,2.0\n")
    write(tmp_path, 9, "step,loss\n30,8.0\n")
    assert read_curves(tmp_path) == {"loss": [(10, 5.0), (20, 4.0), (30, 3.0), (40, 2.0)], "lr": [(10, 0.1)]}
    assert read_curves(tmp_path / "absent") == {}


@pytest.mark.parametrize("text", ["step,loss\n1,x\n", "loss\n1\n", "step,loss\n1,2,3\n"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, 0, text)
    with pytest.raises(UserError, match=r"version_0.metrics.csv is damaged \(.*remove it"):
        read_curves(tmp_path)


def test_the_loss_is_drawn_with_a_description() -> None:
    svg = draw_loss({"loss": [(step, 10 - step / 10) for step in range(1, 60)]})
    assert svg is not None
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("role") == "img"
    assert root.get("aria-label") == "Loss from 9.40 to 4.60 over 59 logged steps"
    assert "mean of 11" in svg and "logged steps" in svg
    assert draw_loss({"loss": [(1, 2.0)]}) is None and draw_loss({}) is None


def test_the_mean_of_a_short_run_does_not_hide_its_course() -> None:
    svg = draw_loss({"loss": [(10 * step, float(step)) for step in range(25)]})
    assert svg is not None and "mean of 5" in svg and "from 2.00 to 22.00" in svg
    svg = draw_loss({"loss": [(10, 3.0), (20, 1.0)]})
    assert svg is not None and "mean of" not in svg and "logged steps" in svg


def test_losses_of_several_runs_stand_in_one_picture() -> None:
    svg = draw_loss(
        {name: [(1, 2.0), (2, end)] for name, end in (("a&b", 1.0), ("c", 0.5), ("short", 0.0))} | {"e": []}
    )
    assert svg is not None
    label = str(ET.fromstring(svg).get("aria-label"))
    assert label.startswith("Loss a&b: from 2.00 to 1.00 over 2 logged steps; c: from 2.00")
    assert "a&amp;b" in svg and "var(--blue" in svg and "var(--orange" in svg


def test_clips_are_drawn_relative_to_their_start() -> None:
    curves = {
        "loss": [(1, 1.0), (2, 1.0)],
        "scale/a.weight_quantizer": [(1, 0.5), (2, 1.0)],
        "scale/b.weight_quantizer": [(1, 0.1), (2, 0.1)],
        "scale/a.input_quantizer": [(1, 2.0), (2, 1.0)],
        "scale/once.input_quantizer": [(1, 2.0)],
    }
    svg = draw_clips(curves)
    assert svg is not None
    label = str(ET.fromstring(svg).get("aria-label"))
    assert "2 of weights end at 1.50 times their start in the median (1.10 to 1.90 for 80 %)" in label
    assert "1 of inputs end at 0.50 times" in label
    assert draw_clips({"loss": curves["loss"]}) is None
