"""Ranges aggregated from frames to clips to the set; frames spread over whole videos."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam2.calibration.activation_ranges import find_sam2_ranges
from qsam2.calibration.range_hierarchy import HierarchicalData, RangeHierarchy
from qsam2.data.calibration_data import CalibrationData
from qsam2.data.clips import Source
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.errors import UserError
from qsam2.layers.convert import convert, quantizers
from qsam2.models import build_sam2
from qsam2.quantizers import QuantizerState, build_quantizer
from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec
from qsam2.reconstruction.time_scales import SpreadVideo, time_scales

SIZE_PX = 64
AMOUNT = CalibrateRecipe(stills=2, clips=1, num_frames=3)


def hierarchy(*clips: list[float]) -> RangeHierarchy:
    """Of clips whose frame t reaches from minus to plus the t-th value."""
    found = RangeHierarchy()
    for clip in clips:
        for index, value in enumerate(clip):
            found.add((index, 0), -value, value)
        found.end_clip()
    return found


@pytest.mark.parametrize(
    ("clips", "upper"),
    [
        ([[1.0, 1.1, 9.0, 1.2]], 1.2),
        ([[1.0, 1.0], [1.0, 2.0, 3.0, 4.0]], 3.0),
        ([[5.0], [1.0, 1.0]], 5.0),
        ([], -math.inf),
        ([[]], -math.inf),
    ],
    ids=["an odd frame does not count", "a drift does", "a single frame does", "no clip", "no frame"],
)
def test_a_clip_reaches_what_two_of_its_frames_reach(clips: list[list[float]], upper: float) -> None:
    ranges = hierarchy(*clips)
    assert (ranges.lower, ranges.upper) == (-upper, upper)


def test_calls_of_a_frame_belong_together_in_both_passes() -> None:
    found = RangeHierarchy()
    for call, value in enumerate([1.0, 2.0, 1.0, 1.0, 8.0, 1.0]):  # frames 0 1 2 from masks, then from clicks
        found.add((0, call), 0.0, value)
    found.add((0, 1), 0.0, 9.0)
    found.end_clip(length=3)
    assert found.upper == 1.0  # 8 and 9 are one frame's


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e6), min_size=2, max_size=6), min_size=1, max_size=4))
def test_the_set_is_as_wide_as_its_widest_clip(clips: list[list[float]]) -> None:
    found = hierarchy(*clips)
    assert found.upper == max(sorted(clip)[-2] for clip in clips) == -found.lower
    assert found.upper == hierarchy(*clips[::-1]).upper


def test_observed_ranges_can_be_limited() -> None:
    quantizer = build_quantizer(MinMaxSpec(bits=8), "activation", name="here")
    quantizer.state = QuantizerState.OBSERVE
    quantizer(torch.tensor([-5.0, 0.5, 9.0]))
    quantizer.limit_observed(-1.0, 3.0)
    quantizer.finish_observing()
    scale, zero_point = quantizer.scale, quantizer.zero_point
    assert float(scale * (255 - zero_point)) == pytest.approx(3.0, abs=0.02)
    assert float(-scale * zero_point) == pytest.approx(-1.0, abs=0.02)
    with pytest.raises(UserError, match="here: is QUANTIZE, limits apply in OBSERVE only"):
        quantizer.limit_observed(-1.0, 1.0)


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [Source(moving_objects("train", 3))]


def test_calibration_by_hierarchy_is_no_wider(sources: list[Source]) -> None:
    torch.manual_seed(0)
    model = build_sam2("nano", image_size=SIZE_PX)
    convert(model, QuantizeRecipe.model_validate({"activations": {"method": "minmax", "bits": 8, "range": "minmax"}}))
    data = CalibrationData(sources, AMOUNT, image_size=SIZE_PX, max_objects=1, max_stride=1, seed=0)
    found = {}
    for name, given_data in {"plain": data, "hierarchical": HierarchicalData(model, data)}.items():
        find_sam2_ranges(model, given_data, progress=False)
        ranges = {name: float(q.scale) for name, q in quantizers(model) if name.startswith("image_encoder.")}
        found[name] = ranges
    assert len(given_data) == len(data)
    narrower = [found["hierarchical"][name] <= 1.001 * scale for name, scale in found["plain"].items()]
    assert all(narrower)
    assert any(found["hierarchical"][name] < 0.95 * scale for name, scale in found["plain"].items())
    assert not model.image_encoder._forward_pre_hooks and not model.memory_encoder._forward_hooks


def test_frames_are_spread_over_the_whole_video(sources: list[Source]) -> None:
    video = sources[0].videos[0]
    spread = SpreadVideo(video, 3)
    last = len(video) - 1
    expected = [0, round(last / 2), last]
    assert spread.frame_names == [video.frame_names[index] for index in expected]
    assert SpreadVideo(spread, 9).frame_names == spread.frame_names, "a short video is taken whole"
    assert len(spread) == 3 and (spread.name, spread.size) == (video.name, video.size)
    for index, original in enumerate(expected):
        assert np.array_equal(spread.frame(index), video.frame(original))
        masks, theirs = spread.masks(index), video.masks(original)
        assert masks is not None and theirs is not None and masks.keys() == theirs.keys()
        assert all(np.array_equal(masks[key], theirs[key]) for key in masks)


def test_scales_differ_in_time_alone(sources: list[Source]) -> None:
    amount = CalibrateRecipe(stills=2, clips=5, num_frames=3)
    frames = CalibrationData(sources, amount, image_size=SIZE_PX, max_objects=1, max_stride=2, seed=0)
    recipe = SimpleNamespace(calibrate=amount, data=SimpleNamespace(max_objects=1), seed=0)
    model = SimpleNamespace(image_size=SIZE_PX)
    scales = time_scales(SimpleNamespace(recipe=recipe, sources=sources, calibration=frames, model=model))
    assert scales["frame"] is frames
    short, long = scales["short"], scales["long"]
    assert len(short) == 5 and len(long) == 3  # as many as there are videos
    for sample in short.clip_samples():
        assert np.diff(sample.clip.frame_indices).tolist() == [1, 1]
    lengths = {video.name: len(video) for video in sources[0].videos}
    for sample in long.clip_samples():
        assert sample.clip.frame_indices == (0, 1, 2) and lengths[sample.clip.name] > 3
