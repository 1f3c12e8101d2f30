"""J, F, both protocols, fidelity and intervals against references that spell the definitions out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from qsam2.errors import UserError
from qsam2.evaluation.mask_files import score_folders
from qsam2.evaluation.metrics.interval import half_width, interval_note, interval_text, paired_difference
from qsam2.evaluation.metrics.jf import boundary_accuracy, region_similarity, statistics
from qsam2.evaluation.metrics.scores import Fidelity, VOSScore

MaskPair = tuple[np.ndarray, np.ndarray]


def slow_j(pred: np.ndarray, true: np.ndarray) -> float:
    p, g = ({(int(y), int(x)) for y, x in np.argwhere(mask)} for mask in (pred, true))
    return len(p & g) / len(p | g) if p | g else 1.0


def edge(mask: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) that differ from one of their right, lower and lower-right neighbours within the picture."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    neighbours = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.argwhere(np.any([neighbour != mask for neighbour in neighbours], axis=0))


def slow_f(pred: np.ndarray, true: np.ndarray) -> float:
    reach = math.ceil(0.008 * math.sqrt(pred.shape[0] ** 2 + pred.shape[1] ** 2))
    p, g = edge(pred), edge(true)
    if not len(p) or not len(g):
        return float(len(p) == len(g))

    def share_matched(these: np.ndarray, those: np.ndarray) -> float:
        squared = ((these[:, None] - those[None]) ** 2).sum(-1).min(1)
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
    kept, started, seen = [], False, False
    for t, (p, g) in enumerate(zip(pred, true, strict=True)):
        if protocol == "davis":  # after the prompt
            if started and t < len(true) - 1:
                kept.append((p, g))
            started = started or g.any()
        elif 0 < t < len(true) - 1:
            started = started or p.any() or g.any()
            seen = seen or g.any()
            if started:
                kept.append((p, g))
    if not kept or not (seen or protocol == "davis"):
        return None
    j, f = [slow_j(p, g) for p, g in kept], [slow_f(p, g) for p, g in kept]
    return tuple(100 * value for value in (*slow_statistics(j), *slow_statistics(f)))


@st.composite
def noise(draw: st.DrawFn, frames: int = 2) -> MaskPair:
    shape = (frames, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return draw(arrays(bool, shape)), draw(arrays(bool, shape))


@st.composite
def shapes(draw: st.DrawFn) -> MaskPair:
    """Two frames of overlapping rectangles that may touch the image's border, tolerance 1 to 3 pixels."""
    height, width = draw(st.integers(20, 200)), draw(st.integers(20, 200))
    masks = np.zeros((2, 2, height, width), bool)
    for mask in masks.reshape(4, height, width):
        for _ in range(draw(st.integers(0, 2))):
            y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
            mask[y : y + draw(st.integers(1, height)), x : x + draw(st.integers(1, width))] ^= True
    return masks[0], masks[1]


def random_masks(seed: int, frames: int = 5) -> MaskPair:
    corners = np.random.default_rng(seed).integers(0, 12, (2, frames, 2))
    masks = np.zeros((2, frames, 24, 24), bool)
    for which, t in np.ndindex(2, frames):
        y, x = corners[which, t]
        masks[which, t, y : y + 12, x : x + 8] = True
    return masks[0], masks[1]


@settings(max_examples=150, deadline=None)
@given(noise())
def test_scores_equal_reference_on_noise(masks: MaskPair) -> None:
    pred, true = masks
    wide = np.repeat(true, 2, axis=2)[:, :, ::2]  # strides of 2
    for measure, slow in ((region_similarity, slow_j), (boundary_accuracy, slow_f)):
        expected = [slow(p, g) for p, g in zip(pred, true, strict=True)]
        assert measure(pred, true).tolist() == measure(pred, wide).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_boundary_accuracy_equals_reference_on_shapes(masks: MaskPair) -> None:
    expected = [slow_f(p, g) for p, g in zip(*masks, strict=True)]
    np.testing.assert_allclose(boundary_accuracy(*masks), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "shift"),
    [((480, 854), 8), ((480, 854), 9), ((75, 100), 1), ((75, 100), 2)],  # (75, 100): 0.8 % is exactly one pixel
)
def test_boundary_tolerance_at_the_usual_size(size: tuple[int, int], shift: int) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    true = (y - size[0] // 2) ** 2 + (x - size[1] // 2) ** 2 < (size[0] // 4) ** 2
    pred = np.roll(true, shift, axis=1)
    assert boundary_accuracy(pred[None], true[None])[0] == pytest.approx(slow_f(pred, true), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40) | st.just([0.9, 0.6, 0.4, 0.2]).map(lambda x: 100 * x))
def test_statistics_equal_reference(scores: list[float]) -> None:
    """Also of 400 frames, where the reference evaluator wraps (at 256)."""
    np.testing.assert_allclose(statistics(np.array(scores)), slow_statistics(scores), rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("case", ["davis", "sav", "sav_late"])
def test_golden_cases_equal_the_reference_evaluators(data_root: Path, case: str) -> None:
    root, protocol = data_root / "golden_jf" / case, case.split("_")[0]
    if not root.is_dir():
        pytest.skip(f"{root} is absent")
    expected = json.loads((root / "expected.json").read_text())
    folders = ("results", "Annotations/480p") if protocol == "davis" else ("pred", "gt")
    found = score_folders(*(root / folder for folder in folders), protocol)
    assert found["protocol"] == protocol
    per_object = {(name, item): scores for name, items in found["per_object"].items() for item, scores in items.items()}
    if protocol == "davis":  # as shares, with recall and decay
        theirs = {tuple(name.rsplit("_", 1)): scores for name, scores in expected["per_object"].items()}
        means = {"J&F": expected["J&F"]}
        for measure in ("J", "F"):
            for key, name in ((measure, "M"), (f"{measure}_recall", "R"), (f"{measure}_decay", "D")):
                means[key] = expected[measure][name]
        scale = 100
    else:
        theirs = {(name, item): scores for name, o in expected["per_object"].items() for item, scores in o.items()}
        means, scale = {key: expected[key] for key in ("J&F", "J", "F")}, 1
    assert {key: found[key] for key in means} == pytest.approx({k: scale * v for k, v in means.items()}, abs=1e-9)
    assert per_object.keys() == theirs.keys()
    for name, scores in theirs.items():
        j, f = scale * scores["J"], scale * scores["F"]
        assert per_object[name] == pytest.approx({"J&F": (j + f) / 2, "J": j, "F": f}, abs=1e-9), name


def test_result_is_plain_sorted_and_in_percent() -> None:
    metric = VOSScore("davis")
    _, true = random_masks(4)
    for sequence, object_id in (("b", 10), ("b", 2), ("a", "001")):
        metric.update(sequence, object_id, true, true)
    found = metric.compute()
    assert json.loads(json.dumps(found)) == found
    assert [found[key] for key in ("J&F", "J", "F", "J_recall", "F_recall")] == [100.0] * 5
    assert found["J_decay"] == found["F_decay"] == 0
    assert [(s, list(o)) for s, o in found["per_object"].items()] == [("a", ["001"]), ("b", ["2", "10"])]


def test_an_object_is_scored_from_its_prompt_on() -> None:
    """Seen first on frame 5 of 8: frame 6 is scored, frames before it are not perfect ones; too late is said."""
    pred, true = random_masks(3, frames=8)
    pred[:5], true[:5] = False, False
    metric = VOSScore("davis")
    metric.update("a", 1, pred, true)
    found = metric.compute()
    assert found["J"] == pytest.approx(100 * slow_j(pred[6], true[6]))
    assert (found["scored"], found["left_out"]) == ({"videos": 1, "frames": 1, "objects": 1}, {})
    for item, first in ((2, 6), (3, 7), (4, 8)):
        late = true.copy()
        late[:first], late[first:] = False, True
        metric.update("a", item, pred, late)
    found = metric.compute()
    assert list(found["per_object"]["a"]) == ["1"] and found["scored"]["objects"] == 1
    last = "is in no true mask between the first and the last"
    assert found["left_out"] == {
        "a": [
            "object 2 is seen first in annotated frame 7 of 8, and the last is not scored",
            f"object 3 {last}",
            f"object 4 {last}",
        ]
    }


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_an_object_that_does_not_exist_is_left_out(protocol: str) -> None:
    metric = VOSScore(protocol)
    metric.update("a", 1, MASKS, MASKS)
    metric.update("a", 3, MASKS & False, MASKS & False)
    found = metric.compute()
    assert list(found["per_object"]["a"]) == ["1"] and found["scored"] == {"videos": 1, "frames": 3, "objects": 1}
    assert found["left_out"] == {"a": ["object 3 is in no true mask between the first and the last"]}


def test_fidelity_is_mean_over_frames_then_objects() -> None:
    metric = Fidelity()
    masks, reference = random_masks(7, frames=4)
    metric.update("clip", 1, masks, reference)
    metric.update("clip", 2, reference[:1], reference[:1])
    first, block = region_similarity(masks, reference).mean(), metric.compute()
    assert block["fidelity"] == pytest.approx(50 * (first + 1))
    assert block["per_object"]["clip"] == {"1": {"fidelity": pytest.approx(100 * first)}, "2": {"fidelity": 100}}


def twice(metric: VOSScore | Fidelity, masks: np.ndarray) -> None:
    metric.update("clip", 1, masks, masks)
    metric.update("clip", 1, masks, masks)


MASKS = random_masks(6)[0]
PAIR = MASKS[:2]


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: region_similarity(PAIR.astype(np.float32), PAIR), ["predicted masks are float32", "logits > 0"]),
        (lambda: boundary_accuracy(PAIR, PAIR[0]), ["true masks are bool of shape (24, 24)", "(T, H, W)"]),
        (lambda: region_similarity(PAIR[:1], PAIR), ["(1, 24, 24)", "(2, 24, 24)", "same frames"]),
        (lambda: VOSScore("coco"), ["'coco'", "davis, sav"]),
        (VOSScore("davis").compute, ["no object was scored"]),
        (Fidelity().compute, ["no object was compared"]),
        (lambda: VOSScore("davis").update("clip", 1, PAIR, PAIR), ["clip: 2 annotated frames", "at least 3"]),
        (lambda: VOSScore("davis").update("clip", 7, PAIR, MASKS), ["clip, object 7", "(2, 24, 24)", "(5, 24, 24)"]),
        (lambda: Fidelity().update("clip", 7, PAIR, MASKS), ["clip, object 7", "(2, 24, 24)", "(5, 24, 24)"]),
        (lambda: twice(VOSScore("davis"), MASKS), ["clip: object 1 was given twice"]),
        (lambda: twice(Fidelity(), MASKS), ["clip: object 1 was given twice"]),
    ],
)
def test_errors(call: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts)


def evaluate(clips: list[int], pairs: list[int]) -> list[Any]:
    """Scores of both metrics; in a distributed run each rank gives its own share."""
    vos, fidelity = VOSScore("davis"), Fidelity()
    for seed in clips:
        vos.update(f"clip{seed}", 1, *random_masks(seed))
        vos.update(f"clip{seed}", 12, *random_masks(seed + 100))
    for seed in pairs:
        fidelity.update(f"clip{seed}", "001", *random_masks(seed))
    first = [vos.compute(), fidelity.compute()]
    vos.update("later", torch.distributed.get_rank() if torch.distributed.is_initialized() else 0, *random_masks(50))
    return [*first, len(vos.compute()["per_object"]["later"])]


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    # rank 1 has no pair; clip 2 stands on both ranks, as where a sampler fills up the last batch
    shares = ([0, 1, 2], [0, 1]) if rank == 0 else ([2, 3], [])
    Path(folder, f"{rank}.json").write_text(json.dumps(evaluate(*shares)))
    torch.distributed.destroy_process_group()


def test_two_ranks_score_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    alone = evaluate([0, 1, 2, 3], [0, 1])
    assert math.isfinite(alone[1]["fidelity"]) and alone[2] == 1
    for rank in range(2):
        # metrics go on after compute: each rank added one more object
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [*alone[:2], 2]


def block(values: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Two objects a sequence."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for i, value in enumerate(values):
        result.setdefault(f"clip{i // 2}", {})[str(i % 2)] = {"J&F": float(value), "J": float(value) / 2}
    return result


def test_the_interval_is_students_over_videos() -> None:
    """Videos of one object each: Student's interval of a mean. Copies of an object within its video add nothing."""
    ours, theirs = [41.0, 63.5, 20.25, 77.0], [40.0, 60.0, 25.0, 70.0]
    one = [{f"v{i}": {"1": {"J&F": score}} for i, score in enumerate(scores)} for scores in (ours, theirs)]
    many = [{video: {str(k): o["1"] for k in range(5)} for video, o in each.items()} for each in one]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval()
    found = paired_difference(*one)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["difference"] == pytest.approx(np.mean(np.subtract(ours, theirs)))
    assert (found["objects"], found["unit"], found["videos"]) == (4, "videos", 4)
    copied = paired_difference(*many)
    assert (copied["low"], copied["high"], copied["objects"]) == (pytest.approx(low), pytest.approx(high), 20)


def test_videos_count_by_their_objects() -> None:
    """A mean over objects, whose interval has no width where all objects differ by the same."""
    few, many = {"1": {"J&F": 4.0}}, {str(k): {"J&F": 0.0} for k in range(3)}
    none = {"few": {"1": {"J&F": 0.0}}, "many": many}
    found = paired_difference({"few": few, "many": many}, none)
    assert found["difference"] == 1 and found["low"] < 0
    same = {video: {k: {"J&F": 2.0} for k in items} for video, items in none.items()}
    found = paired_difference(same, none)
    assert (found["low"], found["high"]) == pytest.approx((2, 2))


def test_one_video_has_no_interval() -> None:
    ours = {"a": {"1": {"J&F": 40.0}, "2": {"J&F": 50.0}}}
    theirs = {"a": {"1": {"J&F": 41.0}, "2": {"J&F": 53.0}}}
    found = paired_difference(ours, theirs)
    assert found == {"difference": -2, "low": None, "high": None, "objects": 2, "unit": "videos", "videos": 1}
    assert interval_text(found) == "-2.0 (no interval: one video)"
    assert interval_note(paired_difference(block([1, 2, 3]), block([0, 0, 0]), unit="images")) == (
        "95 % t interval over 2 images, 3 objects"
    )
    assert interval_note({"unit": "videos", "videos": 1, "objects": 1}).endswith(" 1 object")


def percentile_over_objects(rng: np.random.Generator, values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values[rng.integers(0, len(values), (300, len(values)))].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("objects", [7, 21])
def test_the_interval_covers(objects: int) -> None:
    """Normal differences around 0 with a part that a video's objects share, 7 videos."""
    rng, times, videos = np.random.default_rng(0), 1000, 7
    t, percentile = 0, 0
    for _ in range(times):
        values = rng.normal(0, 1, (videos, 1)) + rng.normal(0, 1, (videos, objects // videos))
        reach = half_width(values.sum(axis=1), np.full(videos, objects // videos))
        t += reach is not None and abs(values.mean()) <= reach
        low, high = percentile_over_objects(rng, values.ravel())
        percentile += low <= 0 <= high
    assert 0.92 * times <= t <= 0.97 * times
    assert percentile < 0.92 * times


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=20))
def test_swapping_the_models_mirrors_the_interval(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = block([a for a, _ in pairs]), block([b for _, b in pairs])
    found, mirrored = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert found["low"] <= found["high"]
    assert [-found["high"], -found["low"], -found["difference"]] == pytest.approx(
        [mirrored["low"], mirrored["high"], mirrored["difference"]], abs=1e-9
    )


def test_difference_by_key_and_order_of_objects() -> None:
    ours, theirs = block([10, 40, 20, 70, 5]), block([12.3, 30, 25.1, 60.9, 37])
    found = paired_difference(ours, theirs)
    turned = {name: dict(reversed(objects.items())) for name, objects in reversed(ours.items())}
    assert paired_difference(turned, theirs) == found
    assert paired_difference(ours, theirs, key="J")["difference"] == found["difference"] / 2


@pytest.mark.parametrize(
    ("ours", "theirs", "key", "message"),
    [
        ([1, 2], [1], "J", "1 objects are in one block only, e.g. clip0/1 is not in the reference"),
        ([1], [1, 2, 3], "J", "2 objects are in one block only, e.g. clip0/1 is not in the scores"),
        ([], [], "J", "per_object: no objects; a comparison needs at least one"),
        ([1], [1], "IoU", "key: 'IoU' is not scored for clip0/0; choose J&F, J"),
    ],
)
def test_blocks_that_cannot_be_compared(ours: list[int], theirs: list[int], key: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        paired_difference(block(ours), block(theirs), key=key)
    assert message in str(caught.value) and "\n" not in str(caught.value)
