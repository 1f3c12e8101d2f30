"""The state machine of a quantizer, its messages, and how it is saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import calibrate
from messages import Message
from safetensors.torch import load_file, save_file

from qsam2.errors import UserError
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.quantizers.base import QUANTIZERS
from qsam2.recipe.quantizer_specs import LSQSpec, MinMaxSpec, PACTSpec, QuantizerSpec, Role, methods

FLOAT, OBSERVE, QUANTIZE, FROZEN = QuantizerState
every_method = pytest.mark.parametrize(
    ("spec_type", "role"), [(spec, role) for spec in methods().values() for role in spec.roles]
)


def make(spec_type: type[QuantizerSpec] = LSQSpec, role: Role = "activation", *, observing: bool = False) -> Quantizer:
    quantizer = build_quantizer(spec_type(bits=4), role, num_channels=3, name="encoder.fc1")  # type: ignore[call-arg]
    quantizer.state = OBSERVE if observing else FLOAT
    return quantizer


def calibrated(spec_type: type[QuantizerSpec] = LSQSpec, role: Role = "activation") -> Quantizer:
    quantizer = make(spec_type, role)
    calibrate(quantizer, torch.randn(3, 20))
    return quantizer


def test_every_spec_of_the_recipe_has_its_quantizer() -> None:
    assert set(QUANTIZERS) == set(methods().values())


def test_float_and_observe_return_the_input_itself() -> None:
    quantizer, x = make(), torch.randn(3, 4)
    assert quantizer.state is FLOAT and not quantizer.calibrated and quantizer(x) is x
    quantizer.state = OBSERVE
    assert quantizer(x) is x
    quantizer.finish_observing()
    assert quantizer.state is QUANTIZE and quantizer.calibrated
    before = quantizer(x)
    assert before is not x
    quantizer.state = FLOAT
    assert quantizer(x) is x
    quantizer.state = QUANTIZE
    assert torch.equal(quantizer(x), before)


@every_method
def test_frozen_is_reproducible_and_follows_nothing(spec_type: type[QuantizerSpec], role: Role) -> None:
    quantizer, x = calibrated(spec_type, role).train(), torch.randn(3, 8)
    quantizer.freeze()
    assert quantizer.state is FROZEN
    first, state = quantizer(x), copy.deepcopy(quantizer.state_dict())
    for other in (10 * x, x, torch.zeros_like(x)):
        quantizer(other)
    for parameter in quantizer.learned_parameters():
        parameter.data.add_(1.0)
    assert torch.equal(quantizer(x), first) and not quantizer(x).requires_grad
    for name in ("frozen_scale", "frozen_zero_point", "state_code"):
        assert torch.equal(quantizer.state_dict()[name], state[name])


def test_freezing_with_the_weight_takes_its_statistics_a_last_time() -> None:
    quantizer, weight = calibrated(MinMaxSpec, "weight"), torch.randn(3, 8)
    for factor in (1, 5):  # frozen is frozen
        quantizer.freeze(factor * weight)
        torch.testing.assert_close(quantizer.scale, weight.abs().amax(1) / 7)


def test_observing_again_starts_anew() -> None:
    quantizer = make(MinMaxSpec)
    for factor in (100.0, 1.0):
        calibrate(quantizer, torch.linspace(-factor, factor, 10))
    torch.testing.assert_close(quantizer.scale, torch.tensor([2 / 15]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_calibration_batch_is_refused_by_name(bad: float) -> None:
    with pytest.raises(UserError, match="^calibration batch contains NaN or infinity at encoder.fc1: check the i"):
        make(observing=True)(torch.tensor([1.0, bad]))


def set_state(state: QuantizerState) -> Callable[[Quantizer], object]:
    return lambda quantizer: setattr(quantizer, "state", state)


MISTAKES: dict[str, tuple[Role, Callable[[Quantizer], object]]] = {
    "nothing observed": ("activation", lambda quantizer: quantizer.finish_observing()),
    "quantize without a range": ("activation", set_state(QUANTIZE)),
    "frozen without a range": ("activation", set_state(FROZEN)),
    "to_int": ("activation", lambda quantizer: quantizer.to_int(torch.zeros(2))),
    "dequantize": ("activation", lambda quantizer: quantizer.dequantize(torch.zeros(2, dtype=torch.int32))),
    "no data": ("activation", lambda quantizer: calibrate(quantizer, torch.zeros(0))),
    "frozen while observing": ("activation", lambda quantizer: [set_state(OBSERVE)(quantizer), quantizer.freeze()]),
    "empty weight": ("weight", lambda quantizer: quantizer.initialize_from(torch.zeros(3, 0))),
    "NaN weight": ("weight", lambda quantizer: quantizer.initialize_from(torch.full((3, 2), float("nan")))),
    "channels": ("weight", lambda quantizer: quantizer.initialize_from(torch.zeros(4, 2))),
}


@pytest.mark.parametrize(("role", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_the_quantizer(role: Role, mistake: Callable[[Quantizer], object], message: Message) -> None:
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
def test_impossible_specs_are_refused(spec: QuantizerSpec, role: Role, facts: list[str], message: Message) -> None:
    with pytest.raises(UserError) as error:
        build_quantizer(spec, role, name="q")
    text = message(error)
    assert all(fact in text for fact in ["quantizer q", *facts])


@every_method
@pytest.mark.parametrize("frozen", [True, False])
def test_saving_and_loading_restores_the_output(
    spec_type: type[QuantizerSpec], role: Role, frozen: bool, tmp_path: Path
) -> None:
    quantizer, x = calibrated(spec_type, role).eval(), torch.randn(3, 20)
    if frozen:
        quantizer.freeze()
    expected, state = quantizer(x), quantizer.state_dict()
    fresh = {name: tensor.shape for name, tensor in make(spec_type, role).state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == fresh

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    save_file(state, tmp_path / "q.safetensors")
    twins = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))]
    for state_dict in (torch.load(stream, weights_only=True), load_file(tmp_path / "q.safetensors")):
        twins.append(make(spec_type, role).eval())
        twins[-1].load_state_dict(state_dict)
    for twin in twins:
        assert twin.state is quantizer.state and twin.calibrated and twin.name == quantizer.name
        assert torch.equal(twin(x), expected)


def test_loading_while_observing_observes_on() -> None:
    loaded = make()
    loaded.load_state_dict(make(observing=True).state_dict())
    loaded(torch.ones(4))
    loaded.finish_observing()
    assert loaded.state is QUANTIZE


@pytest.mark.parametrize("spec_type", [spec for spec in methods().values() if "activation" in spec.roles])
def test_observing_may_mix_inference_mode_and_no_grad(spec_type: type[QuantizerSpec]) -> None:
    quantizer = make(spec_type, observing=True)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            quantizer(torch.randn(10))
    quantizer.finish_observing()
    quantizer(torch.randn(10, requires_grad=True)).sum().backward()


def test_the_printed_quantizer_says_what_it_is() -> None:
    assert "activation, 4 bits, affine, per tensor, FLOAT" in repr(make())
