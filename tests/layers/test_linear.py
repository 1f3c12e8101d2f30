"""The linear layer that saves codes of its input: the same gradients as PyTorch's own, in fewer bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.convert import convert
from qsam2.layers.weight import QuantLinear
from qsam2.quantizers.fake_quant import Codes
from qsam2.recipe.quantize import QuantizeRecipe


def two_layers(method: str = "lsc", *, bits: int = 4, bias: bool = True) -> nn.Sequential:
    spec = {"method": method, "bits": bits}
    model = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.GELU(), nn.Linear(16, 5, bias=bias))
    convert(model, QuantizeRecipe.model_validate({"weights": spec, "activations": spec}))
    find_ranges(model, model, [torch.randn(40, 12)])
    return model.train()


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    leaf = x.detach().requires_grad_()
    out = run(leaf)
    out.float().square().sum().backward()
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(found) == len(expected) and all(each is not None for each in found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantLinear, "reads_codes", False)


@pytest.mark.parametrize("method", ["lsc", "lsq", "minmax"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_f_linear(monkeypatch: pytest.MonkeyPatch, method: str, bits: int, bias: bool) -> None:
    model = two_layers(method, bits=bits, bias=bias)
    twin, x = copy.deepcopy(model), torch.randn(3, 7, 12)
    ours = gradients(model, model, x)
    without_codes(monkeypatch)
    assert_same(ours, gradients(twin, twin, x))


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 4, 12)])
def test_any_number_of_dimensions(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    model = two_layers("lsq")
    twin, x = copy.deepcopy(model), torch.randn(shape)
    ours = gradients(model, model, x)
    without_codes(monkeypatch)
    assert ours[0].shape == (*shape[:-1], 5)
    assert_same(ours, gradients(twin, twin, x))


def test_under_autocast_it_rounds_as_f_linear_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return run

    model = two_layers("lsq")
    twin, x = copy.deepcopy(model), torch.randn(6, 12)
    ours = gradients(model, autocast(model), x)
    without_codes(monkeypatch)
    assert ours[0].dtype == torch.bfloat16
    assert_same(ours, gradients(twin, autocast(twin), x))


def test_under_checkpointing() -> None:
    model = two_layers("lsq")
    twin, x = copy.deepcopy(model), torch.randn(6, 12)
    ours = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert_same(ours, gradients(twin, twin, x))


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
    model = nn.Sequential(nn.Linear(64, 8))
    spec = {"method": "lsc", "bits": 4}
    convert(model, QuantizeRecipe.model_validate({"weights": spec, "activations": spec}))
    x = torch.randn(500, 64, requires_grad=True)
    find_ranges(model, model, [x.detach()])
    weight = 4 * 64 * 8
    assert saved_bytes(model.train(), x) <= 2 * x.numel() + weight + 64  # codes, and the quantizer's own byte
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
