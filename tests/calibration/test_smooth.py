"""SmoothQuant: which norms, the scales, the same function, the choice of alpha, and every message."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sam2.modeling.sam2_utils import LayerNorm2d
from small_calibration import calibration_data, on_grid, quantize, relative_error
from torch import Tensor, nn

from qsam2.calibration.forward import encode, run_sample
from qsam2.calibration.smooth import (
    ReaderInputs,
    gather_reader_inputs,
    norms_and_readers,
    quantized_error,
    smooth_norm,
    smoothing_scales,
)
from qsam2.data.calibration_data import Sample
from qsam2.data.clips import collate_clips
from qsam2.layers.hooks import hooked, nested_tensors
from qsam2.models import SAM2, build_sam2
from qsam2.train.video_training import record_clicks


@pytest.fixture(scope="module")
def nano() -> SAM2:
    torch.manual_seed(0)
    return build_sam2("nano", image_size=64)


# Which norms

VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "Slice", "Select", "Index", "ConstantPadNd")
VIEWS += ("Clone", "Expand")
"""Beginnings of the names of autograd nodes that only rearrange or pad with zeros."""


def readers_by_graph(model: SAM2, sample: Sample) -> dict[str, set[str]]:
    """Each norm whose output goes, in autograd's graph, through rearrangements into linear layers alone; these."""
    norms: dict[str, list[Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.LayerNorm, LayerNorm2d)):
            layer.register_forward_hook(lambda _, __, out, name=name: norms.setdefault(name, []).append(out.grad_fn))
    outputs: list[Any] = []
    model.num_correction_pt_per_frame = 1
    with torch.enable_grad():
        for model.prob_to_use_pt_input_for_eval in (0.0, 1.0):
            for out in model(collate_clips([sample.clip])):
                for key in ("multistep_pred_masks_high_res", "multistep_object_score_logits", "multistep_pred_ious"):
                    outputs += nested_tensors(out[key])
    roots, users = {tensor.grad_fn for tensor in outputs} - {None}, {}
    seen = set(roots)
    while roots:
        node = roots.pop()
        for parent, _ in node.next_functions:
            if parent is not None:
                users.setdefault(parent, []).append(node)
                roots |= {parent} - seen
                seen.add(parent)
    weights = {layer.weight: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    def linear(node: Any) -> str | None:
        """The layer whose weight a product takes."""
        for factor, _ in node.next_functions:
            while factor is not None and factor.name().startswith(("TBackward", *VIEWS)):
                factor = factor.next_functions[0][0]
            if (variable := getattr(factor, "variable", None)) is not None and variable in weights:
                return weights[variable]
        return None

    def ends(node: Any) -> Iterator[str | None]:
        for user in users.get(node, []):
            yield from ends(user) if user.name().startswith(VIEWS) else [linear(user)]

    found = {name: {end for node in nodes for end in ends(node)} for name, nodes in norms.items()}
    return {name: readers for name, readers in found.items() if readers and None not in readers}


def test_the_norms_are_those_that_the_graph_shows(nano: SAM2) -> None:
    sample = next(calibration_data(2, num_frames=3).clip_samples())
    by_graph = readers_by_graph(copy.deepcopy(nano), sample)
    listed = {norm: set(readers) for norm, readers in norms_and_readers(nano, quantize()).items()}
    assert by_graph == listed and len(listed) == 9 * 2 + 2 * 3 + 2 + 1
    block = "image_encoder.trunk.blocks.1"
    assert listed[f"{block}.norm1"] == {f"{block}.attn.qkv", f"{block}.proj"}, "two layers read one norm"


def test_norms_before_float_layers_or_added_positions_are_left_alone(nano: SAM2) -> None:
    rules = [{"match": "image_encoder.*", "keep_float": True}]
    assert not any("image_encoder" in name for name in norms_and_readers(nano, quantize(rules=rules)))
    model = copy.deepcopy(nano)
    first, second = model.memory_attention.layers
    first.pos_enc_at_attn = second.pos_enc_at_cross_attn_queries = True
    found = {name for name in norms_and_readers(model, quantize()) if name.startswith("memory_attention")}
    assert found == {f"memory_attention.layers.{name}" for name in ("0.norm2", "0.norm3", "1.norm1", "1.norm3")}


# The scales


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_the_papers_and_one_where_there_is_nothing_to_balance(alpha: float) -> None:
    largest, weights = torch.tensor([1.0, 16.0, 4.0, 0.0, 1.0]), [torch.randn(5, 5), torch.randn(2, 5)]
    for weight in weights:
        weight[:, 4] = 0
    columns = np.abs(np.concatenate([weight.numpy() for weight in weights])).max(0)[:3]
    expected = [*(largest.numpy()[:3] ** alpha / columns ** (1 - alpha)), 1.0, 1.0]
    np.testing.assert_allclose(smoothing_scales(largest, weights, alpha).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("size", ["nano", "tiny"])
@torch.no_grad()
def test_the_function_stays(size: str, nano: SAM2) -> None:
    torch.manual_seed(0)
    model = nano if size == "nano" else build_sam2("tiny", image_size=64)
    for norm in norms_and_readers(model, quantize()):  # gains and shifts as training leaves them
        layer = model.get_submodule(norm)
        nn.init.uniform_(layer.weight, 0.2, 3.0)
        nn.init.normal_(layer.bias)
    smoothed, sample = copy.deepcopy(model), next(calibration_data(2).clip_samples())
    norms = norms_and_readers(model, quantize())
    layers = {name: smoothed.get_submodule(name) for names in norms.values() for name in names}
    inputs = gather_reader_inputs(layers, lambda s: run_sample(smoothed, s), [sample, sample], 2)
    for norm, readers in norms.items():
        chosen = {name: layers[name] for name in readers}
        row = smooth_norm(smoothed.get_submodule(norm), chosen, inputs, quantize(), (0.5,))
        assert (row.alpha, row.error) == (0.5, None) and row.range_over_mean[1] < row.range_over_mean[0]
    for name in layers:
        assert not torch.equal(layers[name].weight, model.get_submodule(name).weight)

    def logits(network: SAM2) -> list[Tensor]:
        """Image features, and the masks and scores of a tracked clip."""
        found = list(encode(network, sample)["backbone_fpn"])
        with hooked({"": network.sam_mask_decoder}, lambda _, __, ___, out: found.extend(out[:2])):
            run_sample(network, sample)
        return found

    with record_clicks() as clicks:
        expected = logits(model)
    with record_clicks(clicks):  # one pixel's sign, which rounding may turn, could move a click
        found = logits(smoothed)
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-5


# One norm


class Pair(nn.Module):
    """A norm that two linear layers read."""

    def __init__(self, spread: float = 30.0) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(16, 4)
        with torch.no_grad():
            self.norm.weight[3] = spread

    def forward(self, sample: Any) -> tuple[Tensor, Tensor]:
        x = self.norm(sample.clip)
        return self.one(x), self.two(x)

    def readers(self) -> dict[str, nn.Module]:
        return {"one": self.one, "two": self.two}

    def inputs(self) -> dict[str, ReaderInputs]:
        return gather_reader_inputs(self.readers(), self, samples(), 4)


def samples(count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [Sample(f"still {k}", torch.randn(20, 16, generator=generator), False) for k in range(count)]  # type: ignore


def test_inputs_are_gathered_in_halves_and_of_long_ones_some_rows_from_end_to_end() -> None:
    model = Pair()
    found, inputs = model.inputs()["one"], [model.norm(sample.clip) for sample in samples()]
    torch.testing.assert_close(found.largest, torch.cat(inputs).abs().amax(0))
    torch.testing.assert_close(torch.cat(found.fit), torch.cat(inputs[:2]))
    torch.testing.assert_close(torch.cat(found.held_out), torch.cat(inputs[2:]))
    layer, x = nn.Linear(2, 2), torch.arange(2000.0).view(2, 500, 2)
    found = gather_reader_inputs({"a": layer}, lambda sample: layer(sample.clip), [Sample("s", x, False)] * 2, 2)["a"]  # type: ignore
    (rows,) = found.fit
    assert len(rows) == 32 and rows[0, 0] == 0 and rows[-1, 1] == 1999 and found.largest.tolist() == [1998, 1999]


@torch.no_grad()
def test_the_alpha_of_least_error_is_chosen() -> None:
    model, alphas = Pair(), (0.2, 0.5, 0.8)
    inputs, plan = model.inputs(), quantize().plan("one")
    weights = {name: layer.weight.clone() for name, layer in model.readers().items()}
    scales = {alpha: smoothing_scales(inputs["one"].largest, list(weights.values()), alpha) for alpha in alphas}
    scales[None] = torch.ones(16)
    errors = {
        alpha: sum(quantized_error(weights[name], inputs[name], scale, plan, name) for name in weights)
        for alpha, scale in scales.items()
    }
    row = smooth_norm(model.norm, model.readers(), inputs, quantize(), alphas)
    assert row.alpha == min(errors, key=errors.__getitem__) and row.alpha is not None
    assert row.error == (pytest.approx(errors[None]), pytest.approx(errors[row.alpha])) and row.error[1] < row.error[0]
    figures = json.loads(json.dumps(vars(row), allow_nan=False))
    assert figures.keys() == {"readers", "alpha", "range_over_mean", "error"}


def test_no_smoothing_is_a_candidate() -> None:
    """A channel is large once, in a row that is not kept: smoothing it would only make the weights coarser."""
    model = Pair(spread=1.0)
    inputs = model.inputs()
    for seen in inputs.values():
        seen.largest[3] = 1e4
    before, bits = copy.deepcopy(model.state_dict()), {"method": "minmax", "bits": 8}
    row = smooth_norm(model.norm, model.readers(), inputs, quantize(activations=bits), (0.5, 1.0))
    assert row.alpha is None and row.error is not None and row.error[0] == row.error[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_error_is_that_of_quantized_inputs_and_weights() -> None:
    model = Pair()
    weight, scales, inputs = model.one.weight, torch.linspace(0.5, 2, 16), model.inputs()["one"]
    fit, x = (torch.cat(half) / scales for half in (inputs.fit, inputs.held_out))
    low, high = fit.min().clamp(max=0), fit.max().clamp(min=0)
    step = (high - low) / 15
    zero = (-low / step).round()
    quantized_x = ((x / step).round() + zero).clamp(0, 15).sub(zero) * step
    scaled = nn.Linear(16, 8)
    scaled.weight = nn.Parameter(weight * scales)
    expected = relative_error(quantized_x @ on_grid(scaled).T, (x * scales) @ weight.T, centred=False)
    both, *alone = (
        quantized_error(weight, inputs, scales, quantize(**changes).plan("one"), "one")
        for changes in ({}, {"weights": None}, {"activations": None})
    )
    assert both == pytest.approx(expected, rel=1e-4)
    assert all(0 < error < both for error in alone), "float weights or activations are not quantized"
