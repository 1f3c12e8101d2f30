"""J, F, both protocols, fidelity and the bootstrap against references that spell the definitions out."""

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

from qsam2.errors import UserError
from qsam2.evaluation.mask_files import score_folders
from qsam2.evaluation.metrics.bootstrap import paired_bootstrap
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


def test_bootstrap_interval_is_that_of_the_central_limit_theorem() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(20, 90, 400)
    difference = rng.normal(-3, 8, 400)  # far smaller than the spread of the scores: pairing matters
    found = paired_bootstrap(block(reference + difference), block(reference))
    mean, half_width = difference.mean(), 1.96 * difference.std() / 20
    assert found["objects"] == 400 and found["difference"] == pytest.approx(mean)
    assert [found["low"], found["high"]] == pytest.approx([mean - half_width, mean + half_width], abs=0.06 * half_width)


def test_bootstrap_interval_of_two_objects_is_exact() -> None:
    found = paired_bootstrap(block([1, 3]), block([0, 0]))  # means 1, 2, 3 with probability 1/4, 1/2, 1/4
    assert found == {"difference": 2, "low": 1, "high": 3, "objects": 2}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=20), st.integers(0, 9))
def test_swapping_the_models_mirrors_the_bootstrap_interval(pairs: list[tuple[float, float]], seed: int) -> None:
    ours, theirs = block([a for a, _ in pairs]), block([b for _, b in pairs])
    found = paired_bootstrap(ours, theirs, samples=200, seed=seed)
    mirrored = paired_bootstrap(theirs, ours, samples=200, seed=seed)
    assert found["low"] <= found["high"]
    assert [-found["high"], -found["low"], -found["difference"]] == pytest.approx(
        [mirrored["low"], mirrored["high"], mirrored["difference"]], abs=1e-9
    )


def test_bootstrap_by_key_seed_and_order_of_objects() -> None:
    ours, theirs = block([10, 40, 20, 70, 5]), block([12.3, 30, 25.1, 60.9, 37])
    found = paired_bootstrap(ours, theirs, samples=500)
    turned = {name: dict(reversed(objects.items())) for name, objects in reversed(ours.items())}
    assert paired_bootstrap(turned, theirs, samples=500) == found
    assert paired_bootstrap(ours, theirs, samples=500, seed=1) != found
    assert paired_bootstrap(ours, theirs, samples=500, key="J")["difference"] == found["difference"] / 2


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
        paired_bootstrap(block(ours), block(theirs), key=key)
    assert message in str(caught.value) and "\n" not in str(caught.value)
