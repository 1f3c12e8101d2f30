"""Weight histograms and the table of calibrated layers on the page."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch
from test_page import METRICS, Page
from torch import nn

from qsam2.calibration.gram import gather_inputs
from qsam2.calibration.weights import CalibratedLayer, calibrate_weights
from qsam2.recipe import build_recipe
from qsam2.report.histograms import draw_histograms
from qsam2.report.page import render

NAMES = [f"image_encoder.trunk.blocks.{index}.mlp.layers.1" for index in range(8)]
RECIPE = build_recipe({"quantize": {"weights": {"method": "minmax", "bits": 4}}}, ["calibrate.weights=frobenius"])


@pytest.fixture(scope="module")
def rows() -> list[CalibratedLayer]:
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 4) for name in NAMES}

    def run(x: torch.Tensor) -> None:
        for layer in layers.values():
            layer(x)

    with torch.no_grad():
        for index, layer in enumerate(layers.values()):
            layer.weight[0, 0] = 3.0 + index  # the last has the heaviest tail
    inputs = gather_inputs(layers, run, [(str(index), torch.randn(20, 6)) for index in range(2)], 2)
    assert RECIPE.quantize is not None and RECIPE.calibrate.weights is not None
    return list(calibrate_weights(layers, inputs, RECIPE.quantize, RECIPE.calibrate.weights))


def test_the_heaviest_tails_are_drawn_with_a_description(rows: list[CalibratedLayer]) -> None:
    svg = draw_histograms(rows)
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and "6 layers before and after" in str(root.get("aria-label"))
    drawn = [name for name in NAMES if f"<!-- {name.removeprefix('image_encoder.trunk.')} -->" in svg]
    heaviest = sorted(rows, key=lambda row: -row.max_over_std[0])[:6]
    assert set(drawn) == {row.name for row in heaviest}
    assert ET.fromstring(draw_histograms(rows[:1])).get("role") == "img"


def test_the_page_has_a_row_a_layer_with_its_figures(rows: list[CalibratedLayer]) -> None:
    page = Page(render(METRICS, RECIPE, [], [], None, rows))
    assert {"svg", "path"} <= page.tags and "Calibrated weights" in page.text
    assert "Least Frobenius norm (strength is ρ); strength chosen on held-out clips" in page.text
    table = {cells[0]: cells for cells in page.rows}
    for row in rows:
        before, after = row.quantized_error
        errors = [f"{100 * before:.2f} → {100 * after:.2f}", f"{100 * row.float_error:.2f}"]
        weights = [f"{old:.3g} → {new:.3g}" for old, new in (row.max_over_std, row.std)]
        inputs = [f"{row.condition_number:.0e}", f"{row.rank}/6"]
        shown = [row.name, "4", f"{row.strength:g}", *errors, *weights, *inputs]
        assert table[row.name] == shown
    assert "Calibrated weights" not in Page(render(METRICS, RECIPE, [], [])).text
