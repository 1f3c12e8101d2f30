"""Quantized layers: what they compute and save; a weight is quantized once an optimizer step, gradients included."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.convert import convert
from qsam2.layers.weight import QuantConv2d, QuantConvTranspose2d, QuantLinear
from qsam2.quantizers.fake_quant import Codes
from qsam2.recipe.quantize import QuantizeRecipe

CLOSE, NEAR = {"atol": 1e-6, "rtol": 1e-6}, {"atol": 1e-4, "rtol": 1e-4}


class Step(nn.Module):
    """Stands for a quantizer: rounds to a learned step (straight-through), and counts its calls."""

    def __init__(self, step: float = 0.1) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(step))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scaled = x / self.step
        return (scaled + (scaled.round() - scaled).detach()) * self.step


def quantized_linear() -> QuantLinear:
    return QuantLinear.from_float(nn.Linear(4, 3), Step(), Step(0.2))


def reference(layer: QuantLinear, x: Tensor) -> Tensor:
    """The same without any sharing."""
    return F.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    return grads


FLOAT_LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), QuantLinear, (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), QuantLinear, (2, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), QuantConv2d, (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4), QuantConv2d, (1, 4, 8, 8)),
    "reflecting": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), QuantConv2d, (1, 2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), QuantConvTranspose2d, (1, 6, 4, 4)),
    "transposed, all options": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, dilation=2, bias=False),
        QuantConvTranspose2d,
        (1, 6, 4, 4),
    ),
}


@pytest.mark.parametrize("build, twin, shape", FLOAT_LAYERS.values(), ids=FLOAT_LAYERS.keys())
def test_a_layer_computes_the_float_layer_of_quantized_tensors(build, twin, shape):
    layer, x = build(), torch.randn(shape)
    quantized = twin.from_float(layer, Step(), Step(0.2))
    output = quantized(x)
    with torch.no_grad():
        rounded = copy.deepcopy(layer)
        rounded.weight.copy_(Step()(layer.weight))
        torch.testing.assert_close(output, rounded(Step(0.2)(x)), **CLOSE)
        assert not torch.equal(output, layer(x))
    assert quantized.weight is layer.weight and quantized.bias is layer.bias
    assert torch.equal(twin.from_float(layer)(x), layer(x)), "no quantizer, no change"
    assert twin.from_float(layer).state_dict().keys() == layer.state_dict().keys()
    assert repr(layer)[:-1] in repr(twin.from_float(layer)), "hyperparameters are kept"
    assert layer.weight.shape[twin.channel_dim] == output.shape[-1 if twin is QuantLinear else 1]


@pytest.mark.parametrize("backwards", [1, 3])
def test_the_weight_is_quantized_once_per_backward_and_gets_all_gradients(backwards):
    layer, inputs = quantized_linear(), [[torch.randn(2, 4) for _ in range(5)] for _ in range(backwards)]
    for calls in inputs:
        sum(layer(x).square().sum() for x in calls).backward()
    assert layer.weight_quantizer.calls == backwards
    ours = gradients(layer)
    for calls in inputs:
        sum(reference(layer, x).square().sum() for x in calls).backward()
    torch.testing.assert_close(ours, gradients(layer), **NEAR)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_steps_are_seen(fused):
    layer, x = quantized_linear(), torch.randn(2, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        optimizer.zero_grad()
        before = layer.quantized_weight().detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.quantized_weight(), before)
        assert torch.equal(layer(x), reference(layer, x))


def doubled(layer: QuantLinear) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in layer.state_dict().items()}


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data replaced": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "parameter replaced": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
    "state dict": lambda layer: layer.load_state_dict(doubled(layer)),
    "state dict assigned": lambda layer: layer.load_state_dict(doubled(layer), assign=True),
    "quantizer parameter": lambda layer: layer.weight_quantizer.step.mul_(3),
    "dtype there and back": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_changed_weight_is_quantized_anew(change, mode):
    layer = quantized_linear()
    with mode():
        before = layer.quantized_weight().detach().clone()
    with torch.no_grad():
        change(layer)
    with mode():
        after = layer.quantized_weight()
        assert not torch.equal(after, before) and torch.equal(after, layer.weight_quantizer(layer.weight))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_weight_is_cached_until_the_layer_moves_or_changes_its_mode(mode):
    layer, x = quantized_linear(), torch.randn(2, 4)
    with mode():
        for calls, training in enumerate((True, False, True), start=1):
            for _ in range(3):
                layer.train(training)(x)
            assert layer.weight_quantizer.calls == calls
    assert layer.to(torch.float64)._cached is None


def test_modes_do_not_spoil_each_other():
    layer, x = quantized_linear(), torch.randn(2, 4)
    with torch.inference_mode():
        layer(x)
    layer(x).square().sum().backward()  # an inference tensor could not be saved for backward
    ours = gradients(layer)
    with torch.no_grad():
        layer(x)
    loss = layer(x).square().sum()
    with torch.inference_mode():
        layer(x)
    loss.backward()
    torch.testing.assert_close(gradients(layer), ours, **NEAR)


def test_a_weight_changed_before_backward_is_refused():
    layer = quantized_linear()
    loss = layer(torch.randn(2, 4)).sum()
    with torch.no_grad():
        layer.weight_quantizer.step.mul_(2)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_frozen_parameters_still_pass_gradients_to_the_input():
    layer = quantized_linear().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight_quantizer.calls == 1


@pytest.mark.parametrize("uncheckpointed_first", [False, True])
def test_activation_checkpointing(uncheckpointed_first):
    layer, inputs = quantized_linear(), [torch.randn(2, 4, requires_grad=True) for _ in range(4)]

    def loss(forward: Callable[[Tensor], Tensor], run: Callable[..., Tensor]) -> Tensor:
        total = forward(inputs[0]).square().sum() if uncheckpointed_first else 0.0
        return total + sum(run(lambda x: torch.tanh(forward(x)), x).square().sum() for x in inputs)

    for calls in (1, 2):  # the second time stands for gradient accumulation
        loss(layer, partial(checkpoint, use_reentrant=False)).backward()
        assert layer.weight_quantizer.calls == calls
    ours = gradients(layer)
    for _ in range(2):
        loss(partial(reference, layer), lambda function, x: function(x)).backward()
    torch.testing.assert_close(ours, gradients(layer), **NEAR)


def test_autocast_casts_once_and_agrees():
    layer, x = quantized_linear(), torch.randn(2, 4)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.quantized_weight().dtype == torch.bfloat16
        assert torch.equal(layer(x), reference(layer, x))
        layer(x).float().square().sum().backward()
        ours = gradients(layer)
        reference(layer, x).float().square().sum().backward()
        torch.testing.assert_close(ours, gradients(layer), **NEAR)
    assert torch.equal(layer(x), full)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_start_without_the_cached_weight(duplicate):
    layer, x = quantized_linear(), torch.randn(2, 4)
    layer(x)
    twin = duplicate(layer)
    assert twin._cached is None and layer._cached is not None
    with torch.no_grad():
        twin.weight.mul_(2)
        assert all(torch.equal(each(x), reference(each, x)) for each in (twin, layer))


def test_a_weight_on_its_grid_needs_no_second_copy():
    layer = quantized_linear().requires_grad_(False)
    layer.weight.copy_(layer.weight_quantizer(layer.weight))
    assert layer.quantized_weight().data_ptr() == layer.weight.data_ptr()


def test_layers_are_freed():
    layer = quantized_linear()
    layer(torch.randn(2, 4))
    dead = weakref.ref(layer)
    del layer
    gc.collect()
    assert dead() is None


def test_compiled_and_exported_layers_agree():
    layer, x = quantized_linear().eval(), torch.randn(2, 4)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), **CLOSE)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)


# The gradient of the weight from saved codes of the input


def two_layers(method: str = "lsc", *, bits: int = 4, bias: bool = True) -> nn.Sequential:
    spec = {"method": method, "bits": bits}
    model = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.GELU(), nn.Linear(16, 5, bias=bias))
    convert(model, QuantizeRecipe.model_validate({"weights": spec, "activations": spec}))
    find_ranges(model, model, [torch.randn(40, 12)])
    return model.train()


def backward(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    leaf = x.detach().requires_grad_()
    out = run(model, leaf)
    out.float().square().sum().backward()
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]


def without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantLinear, "reads_codes", False)


SHAPES = [(3, 7, 12), (12,), (0, 12), (2, 3, 4, 12)]


@pytest.mark.parametrize("method", ["lsc", "lsq", "minmax"])
@pytest.mark.parametrize("bits, shape", zip([2, 4, 8, 4], SHAPES, strict=True))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointed"])
def test_gradients_are_those_of_f_linear(monkeypatch, method, bits, shape, bias, how):
    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return checkpoint(model, x, use_reentrant=False) if how == "checkpointed" else model(x)

    model, x = two_layers(method, bits=bits, bias=bias), torch.randn(shape)
    twin = copy.deepcopy(model)
    ours = backward(model, run, x)
    assert ours[0].shape == (*shape[:-1], 5) and (ours[0].dtype == torch.bfloat16) == (how == "autocast")
    without_codes(monkeypatch)
    how = how.replace("checkpointed", "plain")
    torch.testing.assert_close(ours, backward(twin, run, x), **CLOSE)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    held = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model(x)  # quantized weights are counted once, when they are made
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(saved.values())


def test_an_input_is_saved_in_two_bytes_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two_layers()[:1], torch.randn(500, 12, requires_grad=True)
    assert saved_bytes(model, x) <= 2 * x.numel() + 4 * 12 * 16 + 64  # codes, and the quantizer's own byte; the weight
    without_codes(monkeypatch)
    assert saved_bytes(model, x) >= 5 * x.numel()


def test_a_frozen_weight_needs_no_codes() -> None:
    model = two_layers()
    model[0].weight.requires_grad_(False)
    for parameter in model[0].weight_quantizer.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 12, requires_grad=True)
    assert Codes.of(model[0].quantized_input(x)) is None and Codes.of(model[2].quantized_input(model[1](model[0](x))))
    model(x).sum().backward()
    assert model[0].weight.grad is None and x.grad.abs().sum() > 0


def test_what_comes_out_can_be_written_to() -> None:
    model = two_layers()
    out = model[0](torch.randn(2, 3, 12))
    turned = out.view(2, 3, 2, 8).transpose(1, 2)
    turned[:, :, :1] = 2 * turned[:, :, :1]  # as sam2's rotary encoding
    turned.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
