"""Footage without masks: a float model's own masks prompt it, and it is scored by fidelity alone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from qsam2.data.clips import ClipDataset, Source
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.unlabelled import OWN_MASKS, Unlabelled
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.evaluation import own_masks as module
from qsam2.evaluation.own_masks import OwnMasks, label_sources, label_videos, own_masks
from qsam2.evaluation.scoring import compare, score_any
from qsam2.evaluation.tracking import track
from qsam2.models import SAM2
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe

SIDE = 16


def footage(length: int = 8, seed: int = 0) -> Video:
    """The first frames of a generated video; `Unlabelled` does not ask for its masks."""
    video = copy.copy(moving_objects("val", seed + 1, size=(64, 96))[seed])
    video.name, video.frame_names = f"v{seed}", video.frame_names[:length]
    return video


@pytest.mark.parametrize(
    ("boxes", "kept"),
    [
        ([(0, 0, 4, 4, 0.3), (8, 8, 12, 12, 0.4)], [1, 0]),  # the surest first
        ([(0, 0, 4, 4, 0.3), (8, 8, 12, 12, 0.4), (0, 8, 4, 12, 0.35)], [1, 2]),  # no more than asked for
        ([(0, 0, 4, 4, 0.4), (0, 0, 4, 5, 0.39), (8, 8, 12, 12, 0.3)], [0, 2]),  # one of two that are alike
        ([(0, 0, 8, 8, 0.4), (2, 2, 4, 4, 0.39)], [0]),  # no part of another
        ([(0, 0, 4, 4, 0.4), (8, 8, 12, 12, 0.19)], [0]),  # less than half as sure
        ([(0, 0, 16, 16, 0.9), (0, 0, 0, 0, 0.8), (0, 0, 4, 4, 0.1)], [2]),  # the whole picture, and nothing
        ([(0, 0, 16, 16, 0.9)], []),
    ],
)
def test_the_surest_masks_are_kept(model: SAM2, monkeypatch: pytest.MonkeyPatch, boxes: list, kept: list[int]) -> None:
    """Masks of rectangles (top, left, bottom, right, sureness) in a picture of 16 x 16."""
    logits = torch.full((len(boxes), SIDE, SIDE), -5.0)
    for row, (top, left, bottom, right, _) in zip(logits, boxes, strict=True):
        row[top:bottom, left:right] = 5.0
    sureness = torch.tensor([box[-1] for box in boxes])
    monkeypatch.setattr(module, "_candidates", lambda *_: (logits, sureness))
    masks = own_masks(model, np.zeros((SIDE, SIDE, 3), np.uint8), 2)
    assert list(masks) == list(range(1, len(kept) + 1))
    for mask, index in zip(masks.values(), kept, strict=True):
        assert np.array_equal(mask, (logits[index] > 0).numpy())


def test_masks_are_disjoint_and_the_same_each_time(model: SAM2) -> None:
    frame = footage().frame(0)
    masks, again = (own_masks(model, frame, 5) for _ in range(2))
    assert masks and all(mask.shape == frame.shape[:2] and mask.any() for mask in masks.values())
    assert sum(mask.astype(int) for mask in masks.values()).max() == 1
    assert masks.keys() == again.keys() and all(np.array_equal(mask, again[item]) for item, mask in masks.items())


def test_a_clip_is_tracked_from_its_first_frame(model: SAM2) -> None:
    video = Unlabelled(footage())
    label_sources([Source([video])], model, 2)
    clip = video.clip([3, 5, 1])
    first = own_masks(model, footage().frame(3), 2)
    tracked = track(model, Unlabelled(footage(), [3, 5, 1]), {0: first}, length=3, non_overlapping=True)
    assert [clip.frame_names, clip.size, clip.name] == [["00003", "00005", "00001"], (64, 96), "v0"]
    for item, mask in first.items():
        assert np.array_equal(clip.masks(0)[item], mask)
        assert all(np.array_equal(clip.masks(index)[item], tracked[item][index]) for index in (1, 2))


@pytest.mark.parametrize(("length", "num_frames"), [(8, 3), (8, 1), (1, 3), (1, 1)])
def test_clips_for_calibration(model: SAM2, length: int, num_frames: int) -> None:
    """Also of pictures, which become short clips."""
    sources = [Source([Unlabelled(footage(length))])]
    label_sources(sources, model, 2)
    options = {"num_frames": num_frames, "max_objects": 2, "image_size": 64, "length": 2, "augment": False}
    clips = ClipDataset(sources, **options)
    assert clips[1].images.shape == (num_frames, 3, 64, 64) and clips[1].masks[0].any((1, 2)).all()
    assert torch.equal(clips[1].masks, ClipDataset(sources, **options)[1].masks)


@pytest.mark.parametrize("length", [1, 5])
def test_fidelity_is_the_only_score(model: SAM2, tmp_path: Path, length: int) -> None:
    videos = label_videos([Unlabelled(footage(length, seed)) for seed in range(2)], model, 2)
    settings = (EvaluateRecipe(), TrainerRecipe(accelerator="cpu", devices=1))
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.sam_mask_decoder.mask_tokens.weight, generator=torch.Generator().manual_seed(1))
    own, masks = score_any(model, videos, *settings)
    block, _ = score_any(other, videos, *settings, reference=masks)
    assert own["fidelity"] == 100 and block["fidelity"] < 100
    assert {block["protocol"], block["prompts"]} == {"fidelity", OWN_MASKS}
    assert not {"J&F", "point_mIoU", "box_mIoU"} & block.keys()
    versus = compare(block, own)
    assert versus["difference"] == pytest.approx(block["fidelity"] - 100)
    assert versus["objects"] == sum(len(video.masks(0)) for video in videos)
    assert versus[versus["unit"]] == 2 and versus["unit"] == ("images" if length == 1 else "videos")


def test_pictures_without_objects_are_left_out(model: SAM2, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = [Unlabelled(footage(1, seed)) for seed in range(2)]
    monkeypatch.setattr(OwnMasks, "first", lambda _, video: {1: np.ones((64, 96), bool)} if video.name == "v1" else {})
    assert [video.name for video in label_videos(videos, model, 2)] == ["v1"]
    monkeypatch.setattr(OwnMasks, "first", lambda *_: {})
    with pytest.raises(UserError, match="the float model finds no object in v0 and 1 more: give pictures that show"):
        label_videos([Unlabelled(footage(1, seed)) for seed in range(2)], model, 2)


def test_masks_are_needed_elsewhere() -> None:
    with pytest.raises(UserError, match="v0 has no masks: sources images: and video: are for calibration and for fid"):
        Unlabelled(footage()).masks(0)
