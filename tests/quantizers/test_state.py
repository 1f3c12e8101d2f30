"""The state machine of a quantizer, its messages, and how it is saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import Message
from safetensors.torch import load_file, save_file

from qsam2.errors import UserError
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.quantizers.base import QUANTIZERS
from qsam2.recipe.quantizer_specs import LSQSpec, MinMaxSpec, PACTSpec, QuantizerSpec, methods

SPECS = list(methods().values())
SPECS_AND_ROLES = [(spec, role) for spec in SPECS for role in spec.roles]
ACTIVATION_SPECS = [spec for spec in SPECS if "activation" in spec.roles]
FLOAT, OBSERVE, QUANTIZE, FROZEN = QuantizerState


def make(spec_type: type[QuantizerSpec] = LSQSpec, role: str = "activation", **kwargs: object) -> Quantizer:
    return build_quantizer(spec_type(bits=4, **kwargs), role, num_channels=3, name="encoder.fc1")  # type: ignore[arg-type]


def calibrated(spec_type: type[QuantizerSpec], role: str = "activation") -> Quantizer:
    quantizer = make(spec_type, role)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    if role == "weight":
        quantizer.initialize_from(x)
    else:
        quantizer.state = OBSERVE
        quantizer(x)
        quantizer.finish_observing()
    return quantizer


def test_every_spec_of_the_recipe_has_its_quantizer() -> None:
    assert set(QUANTIZERS) == set(SPECS)


def test_float_and_observe_return_the_input_itself() -> None:
    quantizer, x = make(), torch.randn(3, 4)
    assert quantizer.state is FLOAT and not quantizer.calibrated
    assert quantizer(x) is x
    quantizer.state = OBSERVE
    assert quantizer(x) is x
    quantizer.finish_observing()
    assert quantizer.state is QUANTIZE and quantizer.calibrated
    assert quantizer(x) is not x


@pytest.mark.parametrize(("spec_type", "role"), SPECS_AND_ROLES)
def test_frozen_is_reproducible_and_follows_nothing(spec_type: type[QuantizerSpec], role: str) -> None:
    quantizer, x = calibrated(spec_type, role).train(), torch.randn(3, 8)
    quantizer.freeze()
    assert quantizer.state is FROZEN
    first, state = quantizer(x), copy.deepcopy(quantizer.state_dict())
    for other in (10 * x, x, torch.zeros_like(x)):
        quantizer(other)
    for parameter in quantizer.learned_parameters():
        parameter.data.add_(1.0)
    assert torch.equal(quantizer(x), first)
    for name in ("frozen_scale", "frozen_zero_point", "state_code"):
        assert torch.equal(quantizer.state_dict()[name], state[name])
    assert not quantizer(x).requires_grad


def test_freezing_with_the_weight_takes_its_statistics_a_last_time() -> None:
    quantizer, weight = calibrated(MinMaxSpec, "weight"), torch.randn(3, 8)
    quantizer.freeze(weight)
    torch.testing.assert_close(quantizer.scale, weight.abs().amax(1) / 7)
    quantizer.freeze(5 * weight)  # frozen is frozen
    torch.testing.assert_close(quantizer.scale, weight.abs().amax(1) / 7)


def test_observing_again_starts_anew() -> None:
    quantizer = make(MinMaxSpec)
    for factor in (100.0, 1.0):
        quantizer.state = OBSERVE
        quantizer(torch.linspace(-factor, factor, 10))
        quantizer.finish_observing()
    torch.testing.assert_close(quantizer.scale, torch.tensor([2 / 15]))


def test_float_bypasses_and_comes_back() -> None:
    quantizer, x = calibrated(LSQSpec), torch.randn(3, 5)
    before = quantizer(x)
    quantizer.state = FLOAT
    assert quantizer(x) is x
    quantizer.state = QUANTIZE
    assert torch.equal(quantizer(x), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_calibration_batch_is_refused_by_name(bad: float) -> None:
    quantizer = make()
    quantizer.state = OBSERVE
    with pytest.raises(UserError, match="^calibration batch contains NaN or infinity at encoder.fc1: check the i"):
        quantizer(torch.tensor([1.0, bad]))


def set_state(state: QuantizerState) -> Callable[[Quantizer], object]:
    return lambda quantizer: setattr(quantizer, "state", state)


def observe_nothing(quantizer: Quantizer) -> None:
    quantizer.state = OBSERVE
    quantizer(torch.zeros(0))
    quantizer.finish_observing()


def freeze_while_observing(quantizer: Quantizer) -> None:
    quantizer.state = OBSERVE
    quantizer.freeze()


MISTAKES: dict[str, tuple[str, Callable[[Quantizer], object]]] = {
    "nothing observed": ("activation", lambda quantizer: quantizer.finish_observing()),
    "quantize without a range": ("activation", set_state(QUANTIZE)),
    "frozen without a range": ("activation", set_state(FROZEN)),
    "to_int": ("activation", lambda quantizer: quantizer.to_int(torch.zeros(2))),
    "dequantize": ("activation", lambda quantizer: quantizer.dequantize(torch.zeros(2, dtype=torch.int32))),
    "no data": ("activation", observe_nothing),
    "frozen while observing": ("activation", freeze_while_observing),
    "empty weight": ("weight", lambda quantizer: quantizer.initialize_from(torch.zeros(3, 0))),
    "NaN weight": ("weight", lambda quantizer: quantizer.initialize_from(torch.full((3, 2), float("nan")))),
    "channels": ("weight", lambda quantizer: quantizer.initialize_from(torch.zeros(4, 2))),
}


@pytest.mark.parametrize(("role", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_the_quantizer(role: str, mistake: Callable[[Quantizer], object], message: Message) -> None:
    with pytest.raises(UserError) as error:
        mistake(make(role=role))
    assert "encoder.fc1" in message(error)


class Unknown(QuantizerSpec):
    pass


@pytest.mark.parametrize(
    ("spec", "role", "facts"),
    [
        (LSQSpec(bits=4, granularity="channel"), "activation", ["granularity=channel"]),
        (PACTSpec(bits=4), "weight", ["method=pact", "weights"]),
        (Unknown(method="unknown", bits=4), "weight", ["Unknown", "dorefa", "lsq"]),
    ],
)
def test_impossible_specs_are_refused(spec: QuantizerSpec, role: str, facts: list[str], message: Message) -> None:
    with pytest.raises(UserError) as error:
        build_quantizer(spec, role, name="q")  # type: ignore[arg-type]
    text = message(error)
    assert all(fact in text for fact in ["quantizer q", *facts])


@pytest.mark.parametrize(("spec_type", "role"), SPECS_AND_ROLES)
@pytest.mark.parametrize("frozen", [True, False])
def test_saving_and_loading_restores_the_output(
    spec_type: type[QuantizerSpec], role: str, frozen: bool, tmp_path: Path
) -> None:
    quantizer, x = calibrated(spec_type, role).eval(), torch.randn(3, 20)
    if frozen:
        quantizer.freeze()
    expected = quantizer(x)
    assert set(quantizer.state_dict()) == set(make(spec_type, role).state_dict())

    stream = io.BytesIO()
    torch.save(quantizer.state_dict(), stream)
    stream.seek(0)
    save_file(quantizer.state_dict(), tmp_path / "q.safetensors")
    for state_dict in (torch.load(stream, weights_only=True), load_file(tmp_path / "q.safetensors")):
        loaded = make(spec_type, role).eval()
        shapes = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
        loaded.load_state_dict(state_dict)
        assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == shapes
        assert loaded.state is quantizer.state and loaded.calibrated
        assert torch.equal(loaded(x), expected)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert twin.state is quantizer.state and twin.name == quantizer.name
        assert torch.equal(twin(x), expected)


def test_loading_while_observing_observes_on() -> None:
    quantizer = make()
    quantizer.state = OBSERVE
    loaded = make()
    loaded.load_state_dict(quantizer.state_dict())
    loaded(torch.ones(4))
    loaded.finish_observing()
    assert loaded.state is QUANTIZE


@pytest.mark.parametrize("spec_type", ACTIVATION_SPECS)
def test_observing_may_mix_inference_mode_and_no_grad(spec_type: type[QuantizerSpec]) -> None:
    quantizer = make(spec_type)
    quantizer.state = OBSERVE
    with torch.inference_mode():
        quantizer(torch.randn(10))
    with torch.no_grad():
        quantizer(torch.randn(10))
    quantizer.finish_observing()
    quantizer(torch.randn(10, requires_grad=True)).sum().backward()


def test_learned_parameters_are_all_there_is_to_learn() -> None:
    counts = {"lsq": 1, "lsc": 1, "seq": 1, "pact": 1}
    for spec_type, role in SPECS_AND_ROLES:
        quantizer = make(spec_type, role)
        learned = quantizer.learned_parameters()
        offset = role == "activation"
        assert len(learned) == (
            1 + offset if quantizer.spec.method == "lsq_plus" else counts.get(quantizer.spec.method, 0)
        )
        assert {id(p) for p in learned} == {id(p) for p in quantizer.parameters()}


def test_the_printed_quantizer_says_what_it_is() -> None:
    assert "activation, 4 bits, affine, per tensor, FLOAT" in repr(make())
