"""Range calibration: what is set, from what, in which order, and every message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsam2.calibration.activation_ranges import find_ranges, find_sam2_ranges, in_image_encoder
from qsam2.data.calibration_data import CalibrationData
from qsam2.data.clips import Source
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.errors import UserError
from qsam2.layers.convert import convert, quantizers, set_state
from qsam2.models import SAM2, build_sam2
from qsam2.quantizers import QuantizerState
from qsam2.recipe.calibrate import CalibrateRecipe
from qsam2.recipe.quantize import QuantizeRecipe


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
    spec = {"method": "minmax", "bits": 4}
    convert(model, QuantizeRecipe.model_validate({"weights": spec, "activations": spec, **changes}))
    return model


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_ranges_are_those_of_float_data_over_all_batches(mode):
    model, float_model = stack(), Stack()
    float_model.load_state_dict(model.state_dict(), strict=False)

    def run(batch: Tensor) -> None:
        with mode():
            model(batch)

    assert find_ranges(model, run, iter(batches())) == 3
    assert {quantizer.state for _, quantizer in quantizers(model)} == {QuantizerState.QUANTIZE}
    x = torch.cat(batches())
    inputs = {"first": x, "second": float_model.first(x).relu(), "spare": float_model(x, spare=False)}
    for name, seen in inputs.items():
        quantizer = model.get_submodule(name).input_quantizer
        span = seen.max().clamp(min=0) - seen.min().clamp(max=0)
        torch.testing.assert_close(quantizer.scale, (span / 15).detach().view(1))
        weight = getattr(float_model, name).weight.detach()
        expected = weight.abs().amax(dim=1) / 7
        torch.testing.assert_close(model.get_submodule(name).weight_quantizer.scale, expected)


def test_the_model_quantizes_afterwards_and_weights_are_unchanged():
    model, x = stack(), batches()[0]
    before, weights = model(x), {name: p.clone() for name, p in model.named_parameters()}
    find_ranges(model, model, batches())
    assert not torch.equal(model(x), before)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("state", [QuantizerState.QUANTIZE, QuantizerState.FROZEN])
def test_a_second_calibration_forgets_the_first(state):
    model, fresh = stack(), stack()
    find_ranges(model, lambda batch: model(100 * batch), batches())
    set_state(model, state)
    for each in (model, fresh):
        find_ranges(each, each, batches())
    for (name, ours), (_, theirs) in zip(quantizers(model), quantizers(fresh), strict=True):
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.zero_point, theirs.zero_point), name


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_kept(training):
    model = stack().train(training)
    find_ranges(model, model, batches())
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_names_the_layer(bad):
    data = batches()
    data[1][2, 3] = bad
    model = stack()
    with pytest.raises(UserError, match="at first.input_quantizer"):
        find_ranges(model, model, data)


def test_a_weight_that_is_not_finite_names_the_layer():
    model = stack()
    with torch.no_grad():
        model.spare.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="spare.weight_quantizer"):
        find_ranges(model, lambda batch: model(batch, spare=False) is model.spare(torch.ones(1, 2)), batches())


def test_layers_that_no_batch_reached_are_named():
    model = stack()
    with pytest.raises(UserError, match=r"3 calibration batches did not reach spare.input_quantizer: .* by a rule"):
        find_ranges(model, lambda batch: model(batch, spare=False), batches())


def test_without_batches_unreached_layers_are_counted():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    convert(model, QuantizeRecipe.model_validate({"activations": {"method": "minmax", "bits": 4}}))
    with pytest.raises(UserError, match="0 calibration batches did not reach 0.input.*2.input_quantizer and 4 more:"):
        find_ranges(model, lambda batch: None, [])


def test_weights_alone_need_no_batches():
    model = stack(activations=None)
    assert find_ranges(model, model, []) == 0
    assert {quantizer.state for _, quantizer in quantizers(model)} == {QuantizerState.QUANTIZE}
    model = stack(rules=[{"match": "first", "keep_float": True}])
    assert find_ranges(model, model, [], lambda name: name.startswith("first.")) == 0


# Part by part


def test_only_the_part_is_calibrated_and_the_rest_stays_as_it_is():
    model = stack().eval()
    find_ranges(model, model, batches())
    kept = {name: quantizer.scale.clone() for name, quantizer in quantizers(model)}
    find_ranges(model, lambda batch: model(2 * batch), batches(), lambda name: name.startswith("second."))
    for name, quantizer in quantizers(model):
        assert quantizer.state is QuantizerState.QUANTIZE
        assert torch.equal(quantizer.scale, kept[name]) == (name != "second.input_quantizer")


def test_a_part_sees_what_the_quantized_rest_gives():
    model, x = stack().eval(), torch.cat(batches())
    find_ranges(model, model, batches(), lambda name: name.startswith("first."))
    first = model.first(x).relu()
    assert not torch.equal(first, torch.nn.functional.linear(x, model.first.weight, model.first.bias).relu())
    find_ranges(model, lambda batch: model(batch, spare=False), batches(), lambda name: name.startswith("second."))
    torch.testing.assert_close(model.second.input_quantizer.scale, (first.max() / 15).detach().view(1))
    assert {q.state for name, q in quantizers(model) if name.startswith("spare")} == {QuantizerState.FLOAT}


class Watch:
    """A SAM2 that is calibrated: which quantizers observe and quantize while each part is called."""

    def __init__(self, model: SAM2, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, set[QuantizerState]]] = []
        self.tracked: list[tuple[int, bool]] = []
        """Frames, and whether from points, of each clip that is tracked."""
        self.model = model
        forward_tracking = model.forward_tracking

        def watched(features: Any, batch: Any) -> Any:
            states: dict[str, set[QuantizerState]] = {}
            for name, quantizer in quantizers(model):
                part = "image_encoder" if in_image_encoder(name) else name.split(".")[0]
                states.setdefault(part, set()).add(quantizer.state)
            self.seen.append(states)
            self.tracked.append((batch.num_frames, features["use_pt_input"]))
            return forward_tracking(features, batch)

        monkeypatch.setattr(model, "forward_tracking", watched)


def sam2(**changes: Any) -> SAM2:
    torch.manual_seed(0)
    model = build_sam2("nano", image_size=64)
    spec = {"method": "minmax", "bits": 4}
    convert(model, QuantizeRecipe.model_validate({"weights": spec, "activations": spec, **changes}))
    return model


def data(**amount: int) -> CalibrationData:
    given = CalibrateRecipe.model_validate({"stills": 1, "clips": 1, "num_frames": 5, **amount})
    sources = [Source(list(moving_objects("train", 2)))]
    return CalibrationData(sources, given, image_size=64, max_objects=1, max_stride=1, seed=0)


def test_the_quantized_model_fills_the_bank_that_memory_attention_is_calibrated_on(monkeypatch):
    model = sam2()
    watch = Watch(model, monkeypatch)
    find_sam2_ranges(model, data(clips=2), progress=False)
    assert {quantizer.state for _, quantizer in quantizers(model)} == {QuantizerState.QUANTIZE}
    assert watch.tracked == [(3, False), (3, True), (3, True)] * 2 + [(5, False), (5, True)]
    fills, attends = watch.seen[0], watch.seen[6]
    quantized, observing = {QuantizerState.QUANTIZE}, {QuantizerState.OBSERVE, QuantizerState.FLOAT}
    assert fills["image_encoder"] == attends["image_encoder"] == quantized
    assert fills["memory_encoder"] == fills["sam_mask_decoder"] == observing  # activations, weights
    assert attends["memory_encoder"] == attends["sam_mask_decoder"] == attends["obj_ptr_proj"] == quantized
    assert fills["memory_attention"] == {QuantizerState.FLOAT} and attends["memory_attention"] == observing


def test_the_image_encoder_sees_stills_and_clips(monkeypatch):
    model, seen = sam2(), []
    forward_image = model.forward_image
    monkeypatch.setattr(model, "forward_image", lambda image: seen.append(len(image)) or forward_image(image))
    find_sam2_ranges(model, data(stills=2), progress=False)
    assert seen == [1] * ((2 + 3) + 3 + 2), "three frames of the clip are not encoded again"


def test_a_model_with_float_activations_is_not_run(monkeypatch):
    model = sam2(activations=None)
    monkeypatch.setattr(model, "forward_image", None)
    find_sam2_ranges(model, data(), progress=False)
    assert {quantizer.state for _, quantizer in quantizers(model)} == {QuantizerState.QUANTIZE}


def test_nan_in_a_sample_names_layer_and_sample():
    model, given = sam2(), data()
    with torch.no_grad():
        model.image_encoder.trunk.blocks[0].norm1.bias[0] = float("nan")
    message = r"^calibration sample clip 0 \(.+\): .*NaN or infinity at image_encoder.trunk.blocks.0.attn.qkv"
    with pytest.raises(UserError, match=message):
        find_sam2_ranges(model, given, progress=False)
