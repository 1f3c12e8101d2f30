"""Every method on tensors out of the ordinary, and from conversion to the audit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import calibrated
from messages import Message
from torch import Tensor, nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.errors import UserError
from qsam2.layers.audit import audit
from qsam2.layers.convert import convert, finalize
from qsam2.quantizers import build_quantizer
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec, QuantizerSpec, Role, methods

SPECS_AND_ROLES = [(spec(bits=4), role) for spec in methods().values() for role in spec.roles]
IDS = [f"{spec.method}-{role}" for spec, role in SPECS_AND_ROLES]
every_method = pytest.mark.parametrize(("spec", "role"), SPECS_AND_ROLES, ids=IDS)

ODD: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(6, 4).t(),
    "strided": lambda: torch.randn(4, 12)[:, ::2],
    "expanded": lambda: torch.randn(4, 1, 3).expand(4, 5, 3),
    "channels last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "one element": lambda: torch.tensor([[-0.7]]),
    "constant": lambda: torch.full((4, 5), 1.7),
    "zero": lambda: torch.zeros(4, 5),
    "huge": lambda: 1e25 * torch.randn(4, 5),
    "tiny": lambda: 1e-30 * torch.randn(4, 5),
    "near float32's largest": lambda: 3e38 * torch.randn(4, 5).sign(),
    "near float32's largest, of one sign": lambda: torch.full((4, 5), 3e38),
}


@every_method
@pytest.mark.parametrize("kind", ODD)
def test_layout_changes_nothing_and_all_stays_finite(spec: QuantizerSpec, role: Role, kind: str) -> None:
    torch.manual_seed(0)
    odd = ODD[kind]()
    results = []
    for x in (odd, odd.clone(memory_format=torch.contiguous_format)):
        quantizer = calibrated(spec, role, x).train()
        x = x.detach().requires_grad_()
        out = quantizer(x)
        assert out.shape == x.shape and out.dtype == x.dtype
        out.backward(torch.ones(()).expand(x.shape))
        learned = [parameter.grad for parameter in quantizer.parameters()]
        assert all(result is not None and result.isfinite().all() for result in (out, x.grad, *learned))
        assert (
            all(value.isfinite().all() for value in (quantizer.scale, quantizer.zero_point))
            and quantizer.scale.gt(0).all()
        )
        results.append([out, x.grad, *learned])
    for ours, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(ours, contiguous)  # sums may be in another order


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_quantization_is_in_float32(spec: QuantizerSpec, role: Role, dtype: torch.dtype, autocast: bool) -> None:
    x = torch.randn(4, 50).to(dtype)
    quantizer = calibrated(spec, role, x).eval()
    assert quantizer.scale.dtype == torch.float32
    expected, leaf = quantizer(x.float()).to(dtype), x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = quantizer(leaf)
    assert out.dtype == dtype and torch.equal(out, expected)
    out.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in quantizer.parameters())


@every_method
def test_empty(spec: QuantizerSpec, role: Role) -> None:
    quantizer = calibrated(spec, role, torch.randn(4, 5)).train()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    if role == "weight":
        with pytest.raises(UserError, match="weight is empty"):
            quantizer.initialize_from(torch.zeros(4, 0))
    for shape in ((0, 5), (4, 0)) if role == "activation" else ((4, 0),):
        x = torch.zeros(shape, requires_grad=True)
        out = quantizer(x)
        out.sum().backward()
        assert out.shape == x.shape and quantizer.to_int(x).shape == x.shape
        assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", methods())
def test_from_conversion_to_the_audit(method: str, bits: int) -> None:
    """After training, a finalized weight is its own dequantized integers, and the one that was trained with."""
    spec_type, x = methods()[method], torch.randn(4, 4, 6)
    layers = nn.Linear(6, 8), nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 2, stride=2)
    model = nn.Sequential(layers[0], nn.Flatten(), nn.Unflatten(1, (2, 4, 4)), *layers[1:])
    recipe = QuantizeRecipe.model_validate({f"{role}s": {"method": method, "bits": bits} for role in spec_type.roles})
    rows = convert(model, recipe)
    find_ranges(model, model, [x])
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    trained = model(x)
    finalize(model)
    if "weight" in spec_type.roles:
        weights = sum(layer.weight.numel() for layer in layers)
        assert f"{weights:,} weights on their grids" in audit(model, rows, recipe, lambda: model(x))
    torch.testing.assert_close(model(x), trained)
    again = {name: value.clone() for name, value in model.state_dict().items()}
    finalize(model)  # changes nothing
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_range_that_cannot_be_computed_names_the_quantizer(message: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = build_quantizer(MinMaxSpec(bits=4), "weight", num_channels=4, name="layer.weight_quantizer")
    nothing = torch.full((4,), float("nan"))
    monkeypatch.setattr(quantizer, "_scale_and_zero_point", lambda: (nothing, nothing))
    with pytest.raises(UserError) as error:
        quantizer.initialize_from(torch.ones(4, 5))
    assert "layer.weight_quantizer: no range for values from 1 to 1" in message(error)
    assert not quantizer.calibrated
