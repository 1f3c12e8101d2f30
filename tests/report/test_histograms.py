"""Histograms of weights and inputs with the grid, and charts of signal to noise."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

from kept_run import layers

from qsam2.report.draw import draw_histograms, draw_noise, draw_worst


def row(name: str = "trunk", levels: tuple[int, int] = (-2, 1)) -> dict[str, Any]:
    low, high = levels[0] - 2.0, levels[1] + 2.0
    after = [0.0] * 19 + [0.75] + [0.0] * 19 + [0.25]
    return {
        "layer": name,
        "bits": 2,
        "levels": list(levels),
        "reach": [low, high],
        "before": [0.025] * 40,
        "after": after,
    }


def grid_lines(svg: str) -> int:
    return len(re.findall(r'd="M ([\d.]+) [\d.]+ \s*L \1 [\d.]+ \s*" [^>]*stroke-dasharray[^>]*var\(--green', svg))


def test_histograms_stand_on_their_grid() -> None:
    svg = draw_histograms([row(f"layer{index}") for index in range(3)], "weights")
    label = str(ET.fromstring(svg).get("aria-label"))
    assert "Histograms of the weights of 3 layers" in label and "beyond the grid: layer0 25.00%, layer1 25.00%" in label
    assert grid_lines(svg) == 3 * 4
    assert all(f"layer{index}, 2 bits" in svg for index in range(3))


def test_a_long_name_goes_on_below_and_keeps_all_its_letters() -> None:
    name = "mask_decoder.transformer.layers.1.cross_attn_image_to_token.v_proj"
    svg = draw_histograms([row(name), row("short.name")], "inputs")
    shown = ["".join(text.itertext()).strip() for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "short.name, 2 bits" in shown and f"{name}, 2 bits" not in shown
    halves = [text for text in shown if text and text in f"{name}, 2 bits" and len(text) > 20]
    assert "".join(halves) == f"{name}, 2 bits"


def test_of_many_levels_only_the_ends_are_drawn() -> None:
    assert grid_lines(draw_histograms([row(levels=(0, 255))], "inputs")) == 2


def test_a_figure_has_text_in_the_colour_around_it() -> None:
    svg = draw_histograms([row("<script>")], "inputs")
    assert "<text" in svg and "#000000" not in svg and "currentColor" in svg
    assert "<script>" not in svg and "&lt;script&gt;" in svg


def test_layers_are_drawn_by_their_noise() -> None:
    rows = layers()["layers"]
    noise, worst = draw_noise(rows), draw_worst(rows)
    assert noise is not None and worst is not None
    assert "2 layers: from 9.5 dB (image_encoder.mlp) to 40.0 dB, 24.8 dB in the median" in noise
    assert "first image_encoder.mlp 9.5 dB, attention 20.0 dB, stem 35.0 dB" in worst
    assert worst.index("image_encoder.mlp  2/-") < worst.index("attention  -/4") < worst.index("stem  8/8")
    silent = [row for row in rows if row["name"] == "head"]
    assert draw_noise(silent) is None and draw_worst(silent) is None
