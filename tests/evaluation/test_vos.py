"""VOSScore, MaskIoU and Fidelity: results, errors, and the state they share between ranks."""

from __future__ import annotations

import json
import math
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
from qsam2.evaluation.metrics.iou import Fidelity, MaskIoU, mask_iou
from qsam2.evaluation.metrics.jf import boundary_accuracy, region_similarity
from qsam2.evaluation.metrics.vos import VOSScore

two_masks = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))
)


def random_masks(seed: int, frames: int = 5, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, size // 2, (2, frames, 2))
    masks = np.zeros((2, frames, size, size), bool)
    for which, t in np.ndindex(2, frames):
        y, x = corners[which, t]
        masks[which, t, y : y + size // 2, x : x + size // 3] = True
    return masks[0], masks[1]


def check_message(metric_call: Any, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        metric_call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Properties of J and F


@settings(max_examples=60, deadline=None)
@given(two_masks)
def test_j_and_f_are_symmetric_bounded_and_1_on_equal_masks(masks: tuple[np.ndarray, np.ndarray]) -> None:
    pred, true = masks
    for measure in (region_similarity, boundary_accuracy):
        scores = measure(pred, true)
        assert scores.shape == (len(true),) and scores.dtype == np.float64
        assert ((scores >= 0) & (scores <= 1)).all()
        np.testing.assert_allclose(scores, measure(true, pred), atol=1e-15)
        assert (measure(true, true.copy()) == 1).all()
    equal = (pred == true).all(axis=(1, 2))
    assert ((region_similarity(pred, true) == 1) == equal).all()


def test_tensors_and_views_score_as_arrays_do() -> None:
    pred, true = random_masks(0)
    for measure in (region_similarity, boundary_accuracy):
        expected = measure(pred, true).tolist()
        assert measure(torch.from_numpy(pred), torch.from_numpy(true)).tolist() == expected
        wide = np.repeat(true, 2, axis=2)[:, :, ::2]  # strides of 2
        assert measure(pred, wide).tolist() == expected


@pytest.mark.parametrize("measure", [region_similarity, boundary_accuracy, mask_iou])
def test_wrong_masks_are_refused(measure: Any) -> None:
    masks = np.zeros((2, 4, 4), bool)
    check_message(lambda: measure(masks.astype(np.float32), masks), "predicted masks are float32", "logits > 0")
    check_message(lambda: measure(masks, masks[0]), "true masks are bool of shape (4, 4)", "(T, H, W)")
    check_message(lambda: measure(masks[:1], masks), "(1, 4, 4)", "(2, 4, 4)", "same frames")


# VOSScore


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_first_and_last_frame_do_not_count(protocol: Any) -> None:
    pred, true = random_masks(1)
    scores = []
    for wrong_ends in (False, True):
        pred = pred.copy()
        pred[[0, -1]] = wrong_ends
        metric = VOSScore(protocol)
        metric.update("clip", 1, pred, true)
        scores.append(metric.compute())
    assert scores[0] == scores[1]


def test_object_that_comes_late() -> None:
    pred, true = random_masks(2, frames=8)
    pred[:4], true[:4] = False, False
    scores = {}
    for protocol in ("davis", "sav"):
        metric = VOSScore(protocol)
        metric.update("clip", 1, pred, true)
        scores[protocol] = metric.compute()["J"] / 100
    late = region_similarity(pred, true)[4:7]
    assert scores["sav"] == pytest.approx(late.mean())
    assert scores["davis"] == pytest.approx((3 + late.sum()) / 6)  # both empty counts as 1


def test_sav_counts_false_alarms_before_the_object_and_leaves_out_unseen_objects() -> None:
    pred, true = random_masks(3, frames=6)
    true[:4] = False
    metric = VOSScore("sav")
    metric.update("clip", 1, pred, true)
    metric.update("clip", 2, pred, np.zeros_like(true))
    found = metric.compute()
    assert list(found["per_object"]["clip"]) == ["1"]
    assert found["J"] == pytest.approx(100 * region_similarity(pred, true)[1:5].mean())


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


def test_reset_forgets_and_compute_goes_on() -> None:
    metric = VOSScore("davis")
    pred, true = random_masks(5)
    metric.update("clip", 1, pred, true)
    first = metric.compute()
    metric.update("clip", 2, true, true)
    assert set(metric.compute()["per_object"]["clip"]) == {"1", "2"}
    metric.reset()
    metric.update("clip", 1, pred, true)
    assert metric.compute() == first


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_vos_errors() -> None:
    pred, true = random_masks(6)
    metric = VOSScore("davis")
    check_message(lambda: VOSScore("coco"), "'coco'", "davis, sav")
    check_message(metric.compute, "no object was scored")
    check_message(lambda: metric.update("clip", 1, pred[:2], true[:2]), "clip: 2 annotated frames", "at least 3")
    check_message(lambda: metric.update("clip", 7, pred[1:], true), "clip, object 7", "(4, 24, 24)", "(5, 24, 24)")
    check_message(lambda: metric.update("clip" * 80, 1, pred, true), "322 bytes", "at most 256", "shorten")
    metric.update("clip", 1, pred, true)
    check_message(lambda: metric.update("clip", 1, pred, true), "clip: object 1 was given twice", "reset()")


# IoU


@settings(max_examples=40, deadline=None)
@given(two_masks)
def test_mask_iou_equals_counting(masks: tuple[np.ndarray, np.ndarray]) -> None:
    for iou, p, g in zip(mask_iou(*masks), *masks, strict=True):
        a, b = set(np.flatnonzero(p)), set(np.flatnonzero(g))
        assert iou == (len(a & b) / len(a | b) if a | b else 1)


def test_mask_iou_over_instances_and_over_images() -> None:
    metric = MaskIoU()
    half = np.zeros((1, 2, 2), bool)
    half[0, 0] = True
    full = np.ones((1, 2, 2), bool)
    metric.update("one", full, full)
    metric.update("many", np.repeat(half, 3, axis=0), np.repeat(full, 3, axis=0))
    metric.update("none", half[:0], full[:0])
    assert metric.compute() == {"IoU": 62.5, "IoU_images": 75.0, "instances": 4, "images": 2}


def test_fidelity_is_mean_over_frames_then_objects() -> None:
    metric = Fidelity()
    masks, reference = random_masks(7, frames=4)
    metric.update("clip", 1, masks, reference)
    metric.update("clip", 2, reference[:1], reference[:1])
    first, block = region_similarity(masks, reference).mean(), metric.compute()
    assert block["fidelity"] == pytest.approx(50 * (first + 1))
    assert block["per_object"]["clip"] == {"1": {"fidelity": pytest.approx(100 * first)}, "2": {"fidelity": 100}}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_iou_errors() -> None:
    masks, _ = random_masks(8)
    check_message(MaskIoU().compute, "no instance was scored")
    check_message(Fidelity().compute, "no object was compared")
    check_message(lambda: MaskIoU().update("photo", masks, masks[:2]), "photo", "(5, 24, 24)", "(2, 24, 24)")
    check_message(lambda: Fidelity().update("clip", 3, masks[:0], masks[:0]), "clip, object 3: no frames")
    metric = MaskIoU()
    metric.update("photo", masks, masks)
    check_message(lambda: metric.update("photo", masks, masks), "photo", "given twice")


# Ranks


def evaluate(clips: list[int], images: list[int], pairs: list[int]) -> list[Any]:
    """Scores of all metrics; in a distributed run each rank gives its own share."""
    vos, iou, fidelity = VOSScore("davis"), MaskIoU(), Fidelity()
    for seed in clips:
        vos.update(f"clip{seed}", 1, *random_masks(seed))
        vos.update(f"clip{seed}", 12, *random_masks(seed + 100))
    for seed in images:
        iou.update(f"image{seed}", *random_masks(seed, frames=seed + 1))
    for seed in pairs:
        fidelity.update(f"clip{seed}", "001", *random_masks(seed))
    first = [vos.compute(), iou.compute(), fidelity.compute()]
    vos.update("later", torch.distributed.get_rank() if torch.distributed.is_initialized() else 0, *random_masks(50))
    return [*first, len(vos.compute()["per_object"]["later"])]


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    # rank 1 has no image; clip 2 stands on both ranks, as where a sampler fills up the last batch
    shares = ([0, 1, 2], [0, 1], [0]) if rank == 0 else ([2, 3], [], [1, 2])
    Path(folder, f"{rank}.json").write_text(json.dumps(evaluate(*shares)))
    torch.distributed.destroy_process_group()


def test_two_ranks_score_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    alone = evaluate([0, 1, 2, 3], [0, 1], [0, 1, 2])
    assert math.isfinite(alone[2]["fidelity"]) and alone[3] == 1
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found[:3] == alone[:3]
        assert found[3] == 2  # metrics go on after compute: each rank added one more object
