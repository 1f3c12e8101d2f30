"""Scores of float models that are kept: the same as computed, and computed anew when anything differs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sam2.modeling.sam2_utils import DropPath
from torch import nn

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.video import Masks, Video
from qsam2.errors import UserError
from qsam2.evaluation.scoring import score_float, weights_digest
from qsam2.evaluation.stored_masks import store_masks, stored_masks
from qsam2.layers.convert import convert
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe import build_recipe
from qsam2.recipe.recipe import EvaluateRecipe, MemoryRecipe, TrainerRecipe

MASKS = {("a", 1): np.arange(5, dtype=np.uint8), ("a", 2): np.zeros(3, dtype=np.uint8)}
BLOCK = {"J&F": 1 / 3, "per_object": {"a": {"1": {"J&F": 0.1}}}}
TRAINER = TrainerRecipe(accelerator="cpu", devices=1)


@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluateRecipe:
    return EvaluateRecipe(float_cache=tmp_path)


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    return list(moving_objects("val", 2, size=(64, 96)))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were scored."""
    models: list[Any] = []
    monkeypatch.setattr(
        "qsam2.evaluation.scoring.score_any", lambda model, *_: models.append(model) or (BLOCK, dict(MASKS))
    )
    return models


def test_what_is_kept_is_what_was_computed(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, computed: list[Any]
) -> None:
    first, again = (score_float(model, videos, evaluation, TRAINER) for _ in range(2))
    assert len(computed) == 1
    assert again[0] == first[0] == BLOCK and list(again[1]) == list(MASKS)
    assert all(np.array_equal(again[1][name], masks) for name, masks in MASKS.items())
    assert [file.suffix for file in evaluation.float_cache.iterdir()] == [".npz"]
    for _ in range(2):  # nothing is kept without a folder
        score_float(model, videos, EvaluateRecipe(), TRAINER)
    assert len(computed) == 3


class Changed(Video):
    """A video of which one frame is shown, or one mask, as another."""

    def __init__(self, video: Video, **changes: Any) -> None:
        self._video, self._changes = video, changes
        self.name, self.size, self.frame_names = changes.get("name", video.name), video.size, video.frame_names

    def frame(self, index: int) -> np.ndarray:
        return self._video.frame(index) ^ (index == self._changes.get("frame"))

    def masks(self, index: int) -> Masks | None:
        if index == self._changes.get("unannotated"):
            return None
        masks = dict(self._video.masks(index) or {})
        if index == self._changes.get("mask"):
            masks[1] = ~masks.get(1, np.zeros(self.size, bool))
        return {item + self._changes.get("renumbered", 0): mask for item, mask in masks.items()}


def test_what_differs_is_computed_anew(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, remembers = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        next(parameter for parameter in other.parameters() if parameter.ndim == 1)[0] += 1e-6
    remembers.num_maskmem -= 1
    reads_otherwise = copy.deepcopy(model)
    use_memory(reads_otherwise, MemoryRecipe(cache=True))
    trained_and_tracked = copy.deepcopy(model).train()
    trained_and_tracked.tracked_frame, trained_and_tracked.size = 3, "nano"
    for module in trained_and_tracked.modules():
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.2
        for name, child in module.named_children():
            if isinstance(child, (nn.Dropout, nn.Identity)):
                setattr(module, name, DropPath(0.3))
    last = len(videos[0]) - 1
    cases = (
        (model, videos, evaluation),
        (other, videos, evaluation),
        (remembers, videos, evaluation),
        (reads_otherwise, videos, evaluation),
        (model, videos[:1], evaluation),
        (model, list(moving_objects("test", 2, size=(64, 96))), evaluation),
        (model, [videos[0], Changed(videos[1], frame=last)], evaluation),
        (model, [videos[0], Changed(videos[1], mask=last)], evaluation),
        (model, [videos[0], Changed(videos[1], unannotated=1)], evaluation),
        (model, [videos[0], Changed(videos[1], renumbered=1)], evaluation),
        (model, [videos[0], Changed(videos[1], name="another")], evaluation),
        (model, videos, evaluation.model_copy(update={"protocol": "sav"})),
        (model, videos, evaluation.model_copy(update={"precision": "bf16-true"})),
        (model, videos, evaluation.model_copy(update={"frames": 3})),
    )
    for scored in cases:
        score_float(*scored, TRAINER)
    assert len(computed) == len(cases)
    score_float(model, [Changed(video) for video in videos], evaluation, TRAINER)  # the same content: kept
    score_float(trained_and_tracked, videos, evaluation, TRAINER)  # other dropout, and a frame tracked before: kept
    early = evaluation.model_copy(update={"frames": 3})
    score_float(model, [Changed(videos[0], frame=3), Changed(videos[1], mask=last)], early, TRAINER)  # not scored: kept
    assert len(computed) == len(cases)
    moved = evaluation.float_cache.rename(evaluation.float_cache.with_name("moved"))
    score_float(model, videos, EvaluateRecipe(float_cache=moved), TRAINER)
    assert len(computed) == len(cases)
    evaluation = EvaluateRecipe(float_cache=moved)
    for place, value in (("code_digest", "another version"), ("device_of", torch.device("meta"))):
        monkeypatch.setattr(f"qsam2.evaluation.scoring.{place}", lambda *_, value=value: value)
        score_float(model, videos, evaluation, TRAINER)
    assert len(computed) == len(cases) + 2


def test_of_several_processes_none_keeps_its_share(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsam2.evaluation.scoring._alone", lambda _: False)
    for _ in range(2):
        score_float(model, videos, evaluation, TRAINER)
    assert len(computed) == 2 and not any(evaluation.float_cache.iterdir())


def test_kept_scores_say_again_what_they_leave_out(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    block = {**BLOCK, "left_out": {"no masks": ["a"]}}
    monkeypatch.setattr("qsam2.evaluation.scoring.score_any", lambda *_: (block, MASKS))
    for _ in range(2):
        score_float(model, videos, evaluation, TRAINER)
    assert sum(message.startswith("not scored: ") for message in caplog.messages) == 1


def test_scores_of_quantized_models_are_not_kept(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, computed: list[Any]
) -> None:
    quantized = copy.deepcopy(model)
    convert(quantized, build_recipe({"quantize": {"weights": {"method": "minmax", "bits": 3}}}).quantize)
    for _ in range(2):
        score_float(quantized, videos, evaluation, TRAINER)
    assert len(computed) == 2 and not any(evaluation.float_cache.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.register_buffer("more", torch.zeros(1)),
        lambda model: setattr(model, "image_size", 96),
        lambda model: nn.init.zeros_(model.no_mem_embed),
    ],
)
def test_the_digest_knows_names_values_and_image_size(model: SAM2, change: Any) -> None:
    other = copy.deepcopy(model)
    assert weights_digest(other) == weights_digest(model)
    change(other)
    assert weights_digest(other) != weights_digest(model)


@pytest.mark.parametrize(
    "arrays",
    [
        {"block": "null"},
        {"block": "{", "names": "[]"},
        {"block": "null", "names": '[["a", 1]]', "0": np.array([{}], object)},  # pickled: could run anything
    ],
)
def test_files_that_hold_something_else_are_damaged(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=r"a.npz is damaged \(\w+\): remove it"):
        stored_masks(tmp_path / "a.npz")


def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    """Some are in no one's way, such as the time of a file."""
    file, found = tmp_path / "a.npz", 0
    store_masks(file, MASKS, BLOCK)
    content = file.read_bytes()
    for index in range(0, len(content), 7):
        file.write_bytes(content[:index] + bytes([content[index] ^ 0x15]) + content[index + 1 :])
        try:
            stored_masks(file)
        except UserError as error:
            found += "a.npz is damaged" in str(error)
    assert found > len(content) / 7 / 3


@pytest.mark.usefixtures("computed")
def test_damaged_and_unwritable_files(
    model: SAM2, videos: list[Video], evaluation: EvaluateRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_float(model, videos, evaluation, TRAINER)
    (file,) = evaluation.float_cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"npz is damaged .* remove it"):
        score_float(model, videos, evaluation, TRAINER)
    file.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="could not be written: No space left on device; make room"):
        score_float(model, videos, evaluation, TRAINER)
    assert list(evaluation.float_cache.iterdir()) == []
