"""The card of a quantized model says what it was calibrated on and what was fitted."""

from __future__ import annotations

import pytest

from qsam2.formats.card import build_card, render
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
    ("block", "amount"),
    [
        ({"videos": 30, "frames": 1999, "objects": 61}, "30 videos with 61 objects, 1999 frames"),
        ({"per_object": {"a": {"1": {}, "2": {}}}}, "1 video with 2 objects"),
        ({"images": 5, "objects": 9, "per_object": {"a": {}}}, "5 images with 9 objects"),
    ],
)
def test_the_card_says_how_little_was_scored(block: dict[str, object], amount: str) -> None:
    recipe = build_recipe({"quantize": {"weights": {"method": "minmax", "bits": 4}}})
    card = build_card({"float": SCORES, "quantized": {**SCORES, **block}}, recipe, [])
    assert card["evaluation"]["amount"] == amount
    assert f"- Evaluation: {amount} of moving_objects, davis protocol, " in render(card)
