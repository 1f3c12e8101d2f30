"""J, F and both protocols against a slow reference that spells the definitions out, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qsam2.errors import UserError
from qsam2.evaluation.metrics.jf import boundary_accuracy, region_similarity, statistics
from qsam2.evaluation.metrics.vos import VOSScore


def pixels(mask: np.ndarray) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere(mask)}


def slow_j(pred: np.ndarray, true: np.ndarray) -> float:
    p, g = pixels(pred), pixels(true)
    return len(p & g) / len(p | g) if p | g else 1.0


def slow_edge(mask: np.ndarray) -> list[tuple[int, int]]:
    height, width = mask.shape
    edge = []
    for y in range(height):
        for x in range(width):
            right, below = x + 1 < width, y + 1 < height
            neighbours = []
            if right:
                neighbours.append(mask[y, x + 1])
            if below:
                neighbours.append(mask[y + 1, x])
            if right and below:
                neighbours.append(mask[y + 1, x + 1])
            if any(value != mask[y, x] for value in neighbours):
                edge.append((y, x))
    return edge


def slow_f(pred: np.ndarray, true: np.ndarray) -> float:
    reach = math.ceil(0.008 * math.sqrt(pred.shape[0] ** 2 + pred.shape[1] ** 2))
    p, g = slow_edge(pred), slow_edge(true)
    if not p and not g:
        return 1.0
    if not p or not g:
        return 0.0

    def share_matched(these: list[tuple[int, int]], those: list[tuple[int, int]]) -> float:
        other = np.array(those)
        squared = ((np.array(these)[:, None] - other[None]) ** 2).sum(-1).min(1)
        return float((squared <= reach**2).sum() / len(these))

    precision, recall = share_matched(p, g), share_matched(g, p)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def slow_statistics(scores: list[float]) -> tuple[float, float, float]:
    n = len(scores)
    bounds = [round(1 + (n - 1) * i / 4 + 1e-10) for i in range(5)]  # 1-based, ends inclusive
    quarter = [scores[bounds[i] - 1 : bounds[i + 1]] for i in range(4)]
    mean = [sum(values) / len(values) for values in quarter]
    return sum(scores) / n, sum(score > 0.5 for score in scores) / n, mean[0] - mean[3]


def slow_object(protocol: str, pred: np.ndarray, true: np.ndarray) -> tuple[float, ...] | None:
    """(J mean, recall, decay, F mean, recall, decay) in percent, None where the object is not reported."""
    kept, started, seen = [], protocol == "davis", protocol == "davis"
    for p, g in list(zip(pred, true, strict=True))[1:-1]:
        started = started or p.any() or g.any()
        seen = seen or g.any()
        if started:
            kept.append((p, g))
    if not seen:
        return None
    j, f = [slow_j(p, g) for p, g in kept], [slow_f(p, g) for p, g in kept]
    return tuple(100 * value for value in (*slow_statistics(j), *slow_statistics(f)))


@st.composite
def noise(draw: st.DrawFn, frames: int = 2) -> tuple[np.ndarray, np.ndarray]:
    shape = (frames, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return draw(arrays(bool, shape)), draw(arrays(bool, shape))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two frames of overlapping rectangles that may touch the image's border, tolerance 1 to 3 pixels."""
    height, width = draw(st.integers(20, 200)), draw(st.integers(20, 200))
    masks = np.zeros((2, 2, height, width), bool)
    for mask in masks.reshape(4, height, width):
        for _ in range(draw(st.integers(0, 2))):
            y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
            mask[y : y + draw(st.integers(1, height)), x : x + draw(st.integers(1, width))] ^= True
    return masks[0], masks[1]


@settings(max_examples=150, deadline=None)
@given(noise())
def test_scores_equal_reference_on_noise(masks: tuple[np.ndarray, np.ndarray]) -> None:
    pred, true = masks
    assert region_similarity(pred, true).tolist() == [slow_j(p, g) for p, g in zip(pred, true, strict=True)]
    assert boundary_accuracy(pred, true).tolist() == [slow_f(p, g) for p, g in zip(pred, true, strict=True)]


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_boundary_accuracy_equals_reference_on_shapes(masks: tuple[np.ndarray, np.ndarray]) -> None:
    pred, true = masks
    expected = [slow_f(p, g) for p, g in zip(pred, true, strict=True)]
    np.testing.assert_allclose(boundary_accuracy(pred, true), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "shift"),
    [((480, 854), 8), ((480, 854), 9), ((75, 100), 1), ((75, 100), 2)],  # (75, 100): 0.8 % is exactly one pixel
)
def test_boundary_tolerance_at_the_usual_size(size: tuple[int, int], shift: int) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    true = (y - size[0] // 2) ** 2 + (x - size[1] // 2) ** 2 < (size[0] // 4) ** 2
    pred = np.roll(true, shift, axis=1)
    assert boundary_accuracy(pred[None], true[None])[0] == pytest.approx(slow_f(pred, true), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_statistics_equal_reference(scores: list[float]) -> None:
    np.testing.assert_allclose(statistics(np.array(scores)), slow_statistics(scores), rtol=0, atol=1e-12)


def test_decay_of_long_sequences_takes_the_true_quarters() -> None:
    scores = np.repeat([0.9, 0.6, 0.4, 0.2], 100)  # the reference evaluator wraps at 256 frames
    assert statistics(scores).decay == pytest.approx(slow_statistics(scores.tolist())[2], abs=1e-12)


@pytest.mark.parametrize("protocol", ["davis", "sav"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_protocols_equal_reference(protocol: str, data: st.DataObject) -> None:
    metric = VOSScore(protocol)
    expected = {}
    for name in ("a", "b"):
        pred, true = data.draw(noise(frames=data.draw(st.integers(3, 7))))
        visible = data.draw(arrays(bool, (2, len(true))))  # objects that come late, leave, or never show
        pred, true = pred & visible[0, :, None, None], true & visible[1, :, None, None]
        metric.update(name, 1, pred, true)
        if (scores := slow_object(protocol, pred, true)) is not None:
            expected[name] = scores
    if not expected:
        with pytest.raises(UserError, match="no object was scored"):
            metric.compute()
        return
    result = metric.compute()
    assert set(result["per_object"]) == set(expected)
    for name, scores in expected.items():
        assert result["per_object"][name]["1"] == pytest.approx(
            {"J": scores[0], "F": scores[3], "J&F": (scores[0] + scores[3]) / 2}, abs=1e-9
        )
    mean = [sum(column) / len(expected) for column in zip(*expected.values(), strict=True)]
    found = [result[key] for key in ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay")]
    np.testing.assert_allclose(found, mean, rtol=0, atol=1e-9)
    assert result["J&F"] == pytest.approx((mean[0] + mean[3]) / 2, abs=1e-9)
