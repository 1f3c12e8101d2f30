"""The card of a quantized model says what it was calibrated on and what was fitted."""

from __future__ import annotations

import pytest

from qsam2.formats.card import build_card, render, weights_licence
from qsam2.recipe import build_recipe

SCORES = {"J&F": 50.0, "J": 49.0, "F": 51.0}


@pytest.mark.parametrize(
    ("more", "fitted"),
    [
        ({}, "ranges"),
        (
            {"calibrate": {"weights": "frobenius", "smooth": 0.5, "rounding": "gptq"}},
            "weights (frobenius), scales of LayerNorms (smoothquant), ranges, rounding (gptq)",
        ),
        ({"reconstruct": {"method": "brecq"}}, "ranges, rounding and activation steps (brecq)"),
    ],
)
def test_calibration_line(more: dict[str, object], fitted: str) -> None:
    methods = {"weights": {"method": "minmax", "bits": 4}, "activations": {"method": "minmax", "bits": 8}}
    recipe = build_recipe({"name": "small", "seed": 3, "quantize": methods, **more})
    text = render(build_card({"float": SCORES, "bytes": {"packed": 1000}}, recipe, []))
    line = f"- Calibration: 32 stills and 8 clips of 8 frames from moving_objects, seed 3; fitted: {fitted}"
    assert line in text.splitlines()


@pytest.mark.parametrize(
    ("size", "checkpoint", "licence"),
    [
        ("nano", "auto", "non-commercial research"),
        ("nano_heavy", "auto", "non-commercial research"),
        ("nano_tails", "auto", "non-commercial research"),
        ("nano", None, "that of the data"),
        ("tiny", "auto", "Apache-2.0"),
    ],
)
def test_licence_is_what_the_source_allows(size: str, checkpoint: str | None, licence: str) -> None:
    recipe = build_recipe({"name": "small", "model": {"size": size, "checkpoint": checkpoint}})
    assert licence in weights_licence(recipe)
    assert ("Apache" in weights_licence(recipe)) == (size == "tiny")
