"""The stills and clips of calibration, their passes through SAM2, and every message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_calibration import calibration_data

from qsam2.calibration.forward import ImageFeatures, encode, run_sample
from qsam2.data.calibration_data import Sample, far_apart
from qsam2.data.clips import collate_clips
from qsam2.errors import UserError
from qsam2.models import SAM2, build_sam2
from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.train.video_training import prompted_forward


@pytest.fixture(scope="module")
def model() -> SAM2:
    torch.manual_seed(0)
    return build_sam2("nano", image_size=64)


def test_each_half_has_half_of_the_clips_and_half_of_the_stills() -> None:
    data = calibration_data(stills=4, clips=4)
    labels = [sample.label.split(" (")[0] for sample in data.samples()]
    halves = ["clip 0", "clip 1", "still 0", "still 1"], ["clip 2", "clip 3", "still 2", "still 3"]
    assert labels == [*halves[0], *halves[1]] and len(data) == 8
    assert [sample.label for sample in data.clip_samples()] == [f"clip {k} ({data.clips[k].name})" for k in range(4)]
    assert all(sample.tracked == (len(sample.clip.images) == 2) for sample in data.samples())
    odd = [sample.tracked for sample in calibration_data(stills=3, clips=3).samples()]
    assert len(odd) == 6 and True in odd[:3] and True in odd[3:], "odd numbers leave a clip to each half"
    assert [sample.tracked for sample in calibration_data(stills=0, clips=2).samples()] == [True, True]
    default = CalibrateRecipe()
    assert (default.stills, default.clips, default.num_frames) == (32, 8, 8)


def test_it_follows_from_the_seed_and_stills_are_no_frames_of_the_clips() -> None:
    one, two, other = ([*calibration_data(stills=4, clips=4, seed=seed).samples()] for seed in (0, 0, 1))
    assert all(torch.equal(a.clip.images, b.clip.images) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a.clip.images, b.clip.images) for a, b in zip(one, other, strict=True))
    frames = {(s.clip.name, s.clip.frame_indices[0]) for s in one if s.tracked}
    assert {(s.clip.name, s.clip.frame_indices[0]) for s in one if not s.tracked} != frames


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stills": 41}, "calibrate.stills=41: the train sources hold 40 stills; give more data or 40"),
        ({"clips": 40}, "calibrate.clips=40: the train sources hold 39 clips; give more data or 39"),
        ({"clips": 2, "num_frames": 60}, "calibrate.clips=2: the train sources hold 1 clips; give more data or 1"),
    ],
)
def test_fewer_than_asked_for(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        calibration_data(1, **asked)


@pytest.mark.parametrize(("frames", "kept"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3]), (9, [0, 4, 8])])
def test_frames_far_apart(frames: int, kept: list[int]) -> None:
    (sample, *_) = calibration_data(num_frames=frames).clip_samples()
    short = far_apart(sample)
    assert torch.equal(short.clip.images, sample.clip.images[kept])
    assert torch.equal(short.clip.masks, sample.clip.masks[kept])
    assert list(short.clip.frame_indices) == [sample.clip.frame_indices[index] for index in kept]


@torch.no_grad()
def test_features_are_those_of_forward_image_found_once_within_the_budget(model: SAM2, monkeypatch) -> None:
    first, second = calibration_data(num_frames=5).clip_samples()
    samples = far_apart(first), first, second, far_apart(second)
    wanted = [encode(model, sample) for sample in samples]
    together = model.forward_image(first.clip.images)
    for key in ("backbone_fpn", "vision_pos_enc"):
        assert len(wanted[1][key]) == len(together[key]) == 3
        for ours, theirs in zip(wanted[1][key], together[key], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    a_frame = sum(level[:1].nbytes for level in wanted[0]["backbone_fpn"])
    forward, seen = model.forward_image, []
    monkeypatch.setattr(model, "forward_image", lambda image: seen.append(len(image)) or forward(image))
    features = ImageFeatures(model, 6 * a_frame)
    for sample, expected, encoded in zip(samples, wanted, (3, 2, 5, 2), strict=True):
        found = features.of(sample)
        assert seen == [1] * encoded, "of the second clip one frame has room"
        for key in ("backbone_fpn", "vision_pos_enc"):
            assert all(map(torch.equal, found[key], expected[key]))
        seen.clear()
    assert features.left_bytes == 0
    held = [tensor for levels in features._cache.values() for tensor in levels]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 6 * a_frame, "nothing else is held"
    features.of(first), run_sample(model, first, ("mask",), features)
    assert not seen


def test_a_clip_is_tracked_as_from_prompts_and_a_still_only_encoded(
    model: SAM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found, step = calibration_data(num_frames=3, max_objects=2), [], model.track_step

    def record(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        found.append(out["pred_masks_high_res"])
        return out

    monkeypatch.setattr(model, "track_step", record)
    sample = next(data.clip_samples())
    run_sample(model, sample, ("mask", "click"))
    for points in (False, True):
        prompted_forward(model, collate_clips([sample.clip]), points=points)
    assert len(found) == 12
    for ours, theirs in zip(found[:6], found[6:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    run_sample(model, next(sample for sample in data.samples() if not sample.tracked))
    assert len(found) == 12


def test_a_box_is_the_same_each_time(model: SAM2, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = next(calibration_data(num_frames=2).clip_samples())
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(
        model, "forward_tracking", lambda prompted, _: given.append(prompted["point_inputs_per_frame"][0])
    )
    for _ in range(2):
        run_sample(model, sample, ("click", "box"))
    click, box, _, again = given
    assert box["point_labels"].tolist() == [[2, 3]] * len(click["point_labels"]) and click["point_labels"].shape[1] == 1
    assert torch.equal(box["point_coords"], again["point_coords"])


@pytest.mark.parametrize("run", [encode, run_sample])
def test_a_mistake_names_the_sample(model: SAM2, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_image(_: torch.Tensor) -> None:
        raise UserError("calibration batch contains NaN or infinity at x: check the inputs")

    monkeypatch.setattr(model, "forward_image", forward_image)
    sample: Sample = next(calibration_data().clip_samples())
    with pytest.raises(UserError, match=r"^calibration sample clip 0 \(.+\): calibration batch contains NaN"):
        run(model, sample)
