"""Scores of float models that are kept: the same as computed, and computed anew when anything differs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.evaluation.float_scores import Scored, kept, weights_digest
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe


@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluateRecipe:
    return EvaluateRecipe(float_cache=tmp_path)


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    return list(moving_objects("val", 2, size=(64, 96)))


class Computed:
    """A score whose number of evaluations is counted."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Scored:
        self.times += 1
        masks = {("a", 1): np.arange(5, dtype=np.uint8), ("a", 2): np.zeros(3, dtype=np.uint8)}
        return {"J&F": 1 / 3, "per_object": {"a": {"1": {"J&F": 0.1}}}}, masks


def test_what_is_kept_is_what_was_computed(model: SAM2, videos: list[Video], evaluation: EvaluateRecipe) -> None:
    compute = Computed()
    first, again = (kept(model, videos, evaluation, compute) for _ in range(2))
    assert compute.times == 1
    assert again[0] == first[0] and list(again[1]) == list(first[1])
    assert all(np.array_equal(again[1][name], masks) for name, masks in first[1].items())
    assert [file.suffix for file in evaluation.float_cache.iterdir()] == [".npz"]


def test_nothing_is_kept_without_a_folder(model: SAM2, videos: list[Video]) -> None:
    compute = Computed()
    for _ in range(2):
        kept(model, videos, EvaluateRecipe(), compute)
    assert compute.times == 2


def test_what_differs_is_computed_anew(model: SAM2, videos: list[Video], evaluation: EvaluateRecipe) -> None:
    compute, other = Computed(), copy.deepcopy(model)
    with torch.no_grad():
        next(parameter for parameter in other.parameters() if parameter.ndim == 1)[0] += 1e-6
    protocol = evaluation.model_copy(update={"protocol": "sav"})
    frames = evaluation.model_copy(update={"frames": 3})
    others = moving_objects("test", 2, size=(64, 96))
    for given in (
        (model, videos, evaluation),
        (other, videos, evaluation),
        (model, videos[:1], evaluation),
        (model, list(others), evaluation),
        (model, videos, protocol),
        (model, videos, frames),
    ):
        kept(*given, compute)
    assert compute.times == 6


def test_the_digest_knows_names_values_and_image_size(model: SAM2) -> None:
    other = copy.deepcopy(model)
    assert weights_digest(other) == weights_digest(model)
    other.register_buffer("more", torch.zeros(1))
    assert weights_digest(other) != weights_digest(model)
    del other.more
    other.image_size = 96
    assert weights_digest(other) != weights_digest(model)
    other.image_size = model.image_size
    nn.init.zeros_(other.no_mem_embed)
    assert weights_digest(other) != weights_digest(model)


def test_damaged_and_unwritable_files(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(model, videos, evaluation, Computed())
    (file,) = evaluation.float_cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"npz is damaged .* remove it"):
        kept(model, videos, evaluation, Computed())
    file.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="could not be written: No space left on device; make room"):
        kept(model, videos, evaluation, Computed())
    assert list(evaluation.float_cache.iterdir()) == []
