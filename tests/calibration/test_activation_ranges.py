"""Range calibration: what is set, from what, in which order, aggregated over clips, and every message."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_calibration import calibration_data, converted_nano, quantize
from torch import Tensor, nn

from qsam2.calibration.activation_ranges import (
    HierarchicalData,
    RangeHierarchy,
    find_ranges,
    find_sam2_ranges,
    in_image_encoder,
)
from qsam2.errors import UserError
from qsam2.layers.convert import convert, quantizers, set_state
from qsam2.layers.hooks import hooked
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantizer_specs import MinMaxSpec

QUANTIZE = {QuantizerState.QUANTIZE}


class Stack(nn.Module):
    """Two linear layers, and one that is called only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, spare: bool = True) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.spare(x) if spare else x


def stack(**changes: Any) -> Stack:
    torch.manual_seed(0)
    model = Stack()
    convert(model, quantize(**changes))
    return model


def batches() -> list[Tensor]:
    return list(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)))


def states(model: nn.Module) -> set[QuantizerState]:
    return {quantizer.state for _, quantizer in quantizers(model)}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_ranges_are_those_of_float_data_over_all_batches_and_nothing_else_changes(mode, training) -> None:
    model, float_model, x = stack().train(training), Stack(), torch.cat(batches())
    float_model.load_state_dict(model.state_dict(), strict=False)
    before = model(x)

    def run(batch: Tensor) -> None:
        with mode():
            model(batch)

    find_ranges(model, run, iter(batches()))
    assert states(model) == QUANTIZE
    assert all(module.training == training for module in model.modules())
    inputs = {"first": x, "second": float_model.first(x).relu(), "spare": float_model(x, spare=False)}
    for name, seen in inputs.items():
        layer, weight = model.get_submodule(name), getattr(float_model, name).weight.detach()
        span = seen.max().clamp(min=0) - seen.min().clamp(max=0)
        torch.testing.assert_close(layer.input_quantizer.scale, (span / 15).detach().view(1))
        torch.testing.assert_close(layer.weight_quantizer.scale, weight.abs().amax(dim=1) / 7)
        assert torch.equal(layer.weight, weight)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("state", [QuantizerState.QUANTIZE, QuantizerState.FROZEN])
def test_a_second_calibration_forgets_the_first(state) -> None:
    model, fresh = stack(), stack()
    find_ranges(model, lambda batch: model(100 * batch), batches())
    set_state(model, state)
    for each in (model, fresh):
        find_ranges(each, each, batches())
    for (name, ours), (_, theirs) in zip(quantizers(model), quantizers(fresh), strict=True):
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.zero_point, theirs.zero_point), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(bad) -> None:
    data, model = batches(), stack()
    data[1][2, 3] = bad
    with pytest.raises(UserError, match="at first.input_quantizer"):
        find_ranges(model, model, data)
    with torch.no_grad():
        model.spare.weight[0, 0] = bad
    with pytest.raises(UserError, match="spare.weight_quantizer"):
        find_ranges(model, lambda batch: model(batch, spare=False) is model.spare(torch.ones(1, 2)), batches())


def test_layers_that_no_batch_reached_are_named_and_many_are_counted() -> None:
    model = stack()
    with pytest.raises(UserError, match=r"3 calibration batches did not reach spare.input_quantizer: .* by a rule"):
        find_ranges(model, lambda batch: model(batch, spare=False), batches())
    many = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    convert(many, quantize(weights=None))
    with pytest.raises(UserError, match="0 calibration batches did not reach 0.input.*2.input_quantizer and 4 more:"):
        find_ranges(many, lambda batch: None, [])


def test_weights_alone_need_no_batches(monkeypatch) -> None:
    model = stack(rules=[{"match": "first", "keep_float": True}])
    find_ranges(model, model, [], lambda name: name.startswith("first."))
    model = stack(activations=None)
    find_ranges(model, model, [])
    assert states(model) == QUANTIZE
    model = converted_nano(activations=None)
    monkeypatch.setattr(model, "forward_image", None)
    find_sam2_ranges(model, calibration_data(), progress=False)
    assert states(model) == QUANTIZE


# Part by part


def test_a_part_sees_what_the_quantized_rest_gives_and_the_rest_stays_as_it_is() -> None:
    model, x = stack().eval(), torch.cat(batches())
    find_ranges(model, model, batches(), lambda name: name.startswith("first."))
    first = model.first(x).relu()
    assert not torch.equal(first, torch.nn.functional.linear(x, model.first.weight, model.first.bias).relu())
    find_ranges(model, lambda batch: model(batch, spare=False), batches(), lambda name: name.startswith("second."))
    torch.testing.assert_close(model.second.input_quantizer.scale, (first.max() / 15).detach().view(1))
    assert states(model.spare) == {QuantizerState.FLOAT}

    find_ranges(model, model, batches())
    kept = {name: quantizer.scale.clone() for name, quantizer in quantizers(model)}
    find_ranges(model, lambda batch: model(2 * batch), batches(), lambda name: name.startswith("second."))
    assert states(model) == QUANTIZE
    for name, quantizer in quantizers(model):
        assert torch.equal(quantizer.scale, kept[name]) == (name != "second.input_quantizer")


def test_the_quantized_model_fills_the_bank_that_memory_attention_is_calibrated_on(monkeypatch) -> None:
    model = converted_nano()
    tracked: list[tuple[int, bool]] = []  # frames, and whether from points, of each clip
    seen: list[dict[str, set[QuantizerState]]] = []
    images: list[int] = []
    forward_tracking, forward_image = model.forward_tracking, model.forward_image

    def watch(features: Any, batch: Any) -> Any:
        by_part: dict[str, set[QuantizerState]] = {}
        for name, quantizer in quantizers(model):
            part = "image_encoder" if in_image_encoder(name) else name.split(".")[0]
            by_part.setdefault(part, set()).add(quantizer.state)
        seen.append(by_part)
        tracked.append((batch.num_frames, features["use_pt_input"]))
        return forward_tracking(features, batch)

    monkeypatch.setattr(model, "forward_tracking", watch)
    monkeypatch.setattr(model, "forward_image", lambda image: images.append(len(image)) or forward_image(image))
    find_sam2_ranges(model, calibration_data(2, num_frames=5), progress=False)
    assert images == [1] * (2 + 2 * (3 + 3 + 2)), "stills, then three frames of each clip; these are encoded once more"
    assert states(model) == QUANTIZE
    assert tracked == [(3, False), (3, True), (3, True)] * 2 + [(5, False), (5, True)]
    fills, attends = seen[0], seen[6]
    observing = {QuantizerState.OBSERVE, QuantizerState.FLOAT}  # activations, weights
    assert fills["image_encoder"] == attends["image_encoder"] == QUANTIZE
    assert fills["memory_encoder"] == fills["sam_mask_decoder"] == observing
    assert attends["memory_encoder"] == attends["sam_mask_decoder"] == attends["obj_ptr_proj"] == QUANTIZE
    assert fills["memory_attention"] == {QuantizerState.FLOAT} and attends["memory_attention"] == observing


def test_nan_in_a_sample_names_layer_and_sample() -> None:
    model = converted_nano()
    with torch.no_grad():
        model.image_encoder.trunk.blocks[0].norm1.bias[0] = float("nan")
    message = r"^calibration sample clip 0 \(.+\): .*NaN or infinity at image_encoder.trunk.blocks.0.attn.qkv"
    with pytest.raises(UserError, match=message):
        find_sam2_ranges(model, calibration_data(), progress=False)


# From frames to clips to the set


def hierarchy(*clips: list[float]) -> RangeHierarchy:
    """Of clips whose frame t reaches from minus to plus the t-th value."""
    found = RangeHierarchy()
    for clip in clips:
        for index, value in enumerate(clip):
            found.add(index, 0, -value, value)
        found.end_clip()
    return found


@settings(max_examples=50)
@example([[1.0, 1.1, 9.0, 1.2]])  # an odd frame does not count
@example([[1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])  # a drift does
@example([[5.0], [1.0, 1.0]])  # so does a single frame
@example([[]])
@given(st.lists(st.lists(st.floats(0, 1e6), max_size=6), max_size=4))
def test_the_set_is_as_wide_as_its_widest_clip_which_reaches_what_two_of_its_frames_do(clips: list[list[float]]):
    found = hierarchy(*clips)
    assert found.upper == max((sorted(clip)[-2:][0] for clip in clips if clip), default=-math.inf) == -found.lower
    assert found.upper == hierarchy(*clips[::-1]).upper


def test_calls_of_a_frame_belong_together_in_all_passes() -> None:
    found = RangeHierarchy()
    for call, value in enumerate([1.0, 2.0, 1.0, 1.0, 8.0, 1.0, 1.0, 9.0, 1.0]):  # frames 0 1 2 from mask, click, box
        found.add(0, call % 3, 0.0, value)
    found.end_clip()
    assert found.upper == 1.0  # 2, 8 and 9 are one frame's


def test_a_clip_is_as_wide_as_two_of_its_frames_however_often_it_is_tracked(monkeypatch) -> None:
    model = converted_nano(weights=None)
    frames, passes = [0], [0]
    extremes: dict[str, dict[int, list[float]]] = {}
    limits: dict[str, tuple[float, float]] = {}
    track, forward_tracking = model.track_step, model.forward_tracking

    def watch(name: str, args: Any, _: Any) -> None:
        if tracking[name].state is QuantizerState.OBSERVE:
            extremes.setdefault(name, {}).setdefault(frames[0], []).extend([float(args[0].min()), float(args[0].max())])

    def note(**step: Any) -> Any:
        frames[0] = step["frame_idx"]
        return track(**step)

    def note_pass(*args: Any) -> Any:
        passes[0] += 1
        return forward_tracking(*args)

    monkeypatch.setattr(model, "track_step", note)
    monkeypatch.setattr(model, "forward_tracking", note_pass)
    monkeypatch.setattr(Quantizer, "limit_observed", lambda self, *bounds: limits.update({self.name: bounds}))
    tracking = {name: q for name, q in quantizers(model) if not in_image_encoder(name)}
    with hooked(tracking, watch, before=True):
        find_sam2_ranges(model, HierarchicalData(model, calibration_data(clips=1, num_frames=5)), progress=False)
    assert passes == [4]  # three of three distant frames, then one of all five for the memory attention
    for name in tracking:
        second = min(len(extremes[name]), 2) - 1
        lower = sorted(min(values) for values in extremes[name].values())[second]
        upper = sorted((max(values) for values in extremes[name].values()), reverse=True)[second]
        assert limits[name] == (lower, upper), name


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


def test_calibration_by_hierarchy_is_no_wider() -> None:
    model = converted_nano(weights=None, activations={"method": "minmax", "bits": 8, "range": "minmax"})
    data, found = calibration_data(3, clips=1, num_frames=3), []
    by_hierarchy = HierarchicalData(model, data)
    for samples in (data, by_hierarchy):
        find_sam2_ranges(model, samples, progress=False)
        found.append({name: float(q.scale) for name, q in quantizers(model) if name.startswith("image_encoder.")})
    assert len(by_hierarchy) == len(data)
    ratios = [found[1][name] / scale for name, scale in found[0].items()]
    assert max(ratios) <= 1.001 and min(ratios) < 0.95
    assert not model.image_encoder._forward_pre_hooks and not model.memory_encoder._forward_hooks
