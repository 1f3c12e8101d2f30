"""Scores on stills: the prompts that are drawn from masks, the predictor at any resolution, the score block."""

from __future__ import annotations

import copy
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sam2.sam2_image_predictor import SAM2ImagePredictor

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.evaluation.images import interior_point, score_stills, segment, tight_box
from qsam2.evaluation.scoring import compare
from qsam2.loading import predictor_of
from qsam2.models import SAM2, build_sam2

masks = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(lambda mask: mask.any())


@pytest.fixture(scope="module")
def stills() -> list[Video]:
    return list(moving_objects("val", 3, num_frames=1, size=(64, 96)))


@given(masks)
def test_the_point_lies_deepest_in_the_mask_and_the_box_is_tight(mask: np.ndarray) -> None:
    outside = np.argwhere(~np.pad(mask, 1)) - 1  # the picture's border is an edge too
    depth = {tuple(pixel): np.hypot(*(outside - pixel).T).min() for pixel in np.argwhere(mask)}
    ((x, y),) = interior_point(mask)
    assert depth[int(y), int(x)] == pytest.approx(max(depth.values()), rel=1e-5)
    x0, y0, x1, y1 = tight_box(mask).astype(int)
    assert mask[y0 : y1 + 1, x0 : x1 + 1].sum() == mask.sum()
    assert all(side.any() for side in (mask[y0], mask[y1], mask[:, x0], mask[:, x1]))


def test_the_last_bits_of_distances_choose_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, noise = np.zeros((60, 90), dtype=bool), np.random.default_rng(0)
    mask[5:36, 50:81] = mask[25:56, 10:41] = True  # two squares, 16 pixels deep in their middles
    distances = cv2.distanceTransform

    def noisy(*given: Any) -> np.ndarray:
        found = distances(*given)
        return found * (1 + 2e-7 * noise.standard_normal(found.shape)).astype(np.float32)

    monkeypatch.setattr(cv2, "distanceTransform", noisy)
    assert {tuple(interior_point(mask)[0]) for _ in range(20)} == {(65, 20)}


def test_feature_sizes_are_sam2s_at_1024_px_and_fit_others(model: SAM2) -> None:
    native = build_sam2("nano", image_size=1024)
    assert predictor_of(native)._bb_feat_sizes == SAM2ImagePredictor(native)._bb_feat_sizes
    assert predictor_of(model)._bb_feat_sizes == [(16, 16), (8, 8), (4, 4)]


def test_the_mask_with_the_highest_confidence_counts(model: SAM2, stills: list[Video]) -> None:
    frame, truth = stills[0].frame(0), list(stills[0].masks(0).values())
    predictor = predictor_of(model)
    found = segment(predictor, frame, truth)
    assert found.shape == (2, len(truth), 64, 96) and found.dtype == bool
    candidates, confidence, _ = predictor.predict(box=tight_box(truth[-1]), multimask_output=True)
    np.testing.assert_array_equal(found[1, -1], candidates[confidence.argmax()].astype(bool))


def test_scores_are_means_over_instances_and_over_images(
    model: SAM2, stills: list[Video], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that gives half of each object for a point and the object for a box."""

    def half(_predictor: object, _frame: np.ndarray, truth: list[np.ndarray]) -> np.ndarray:
        whole = np.stack(truth)
        rest = np.cumsum(whole.reshape(len(truth), -1), axis=1).reshape(whole.shape)
        return np.stack([whole & (rest <= whole.sum((1, 2), keepdims=True) // 2), whole])

    monkeypatch.setattr("qsam2.evaluation.images.segment", half)
    empty = copy.copy(stills[0])
    empty.masks = lambda _: {}
    with pytest.raises(UserError, match="no instance was scored"):
        score_stills(model, [empty])
    block, _ = score_stills(model, [*stills, empty])
    areas = {still.name: [mask.sum() for mask in still.masks(0).values()] for still in stills}
    shares = {name: [100 * (area // 2) / area for area in each] for name, each in areas.items()}
    assert block["point_mIoU"] == pytest.approx(np.mean(sum(shares.values(), [])))
    assert block["point_mIoU_images"] == pytest.approx(np.mean([np.mean(each) for each in shares.values()]))
    assert block["box_mIoU"] == block["box_mIoU_images"] == 100
    assert (block["images"], block["instances"]) == (3, sum(map(len, shares.values())))
    for name, each in shares.items():
        assert [scores["point_IoU"] for scores in block["per_object"][name].values()] == pytest.approx(each)


def test_end_to_end_with_a_reference(model: SAM2, stills: list[Video]) -> None:
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.sam_mask_decoder.mask_tokens.weight, generator=torch.Generator().manual_seed(1))
    theirs, their_masks = score_stills(other, stills)
    block, masks = score_stills(model, stills, reference=their_masks)
    versus = compare(block, theirs)
    for prompt in ("point", "box"):
        found = versus[f"{prompt}_IoU"]
        assert found["difference"] == pytest.approx(block[f"{prompt}_mIoU"] - theirs[f"{prompt}_mIoU"])
        assert found["low"] <= found["difference"] <= found["high"]
    assert 0 <= block["fidelity"] < 100
    same, _ = score_stills(model, stills, reference=masks)
    assert same["fidelity"] == 100 and compare(same, block)["box_IoU"]["difference"] == 0
    assert "fidelity" not in theirs
