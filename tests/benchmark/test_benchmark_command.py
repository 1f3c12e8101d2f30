"""`qsam2 benchmark quantizers`: what it writes, that contestants compute the same, how it measures, its messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsam2.benchmark import measure, train_step
from qsam2.benchmark import quantization as benchmark
from qsam2.benchmark import quantization as operation
from qsam2.benchmark.measure import WARM_UPS, held_bytes, machine, medians, peak_allocated_bytes
from qsam2.benchmark.peers import INSTALL, PEERS, Peer, Ranges, choose_peers
from qsam2.benchmark.quantization import measure_operation, stage_3_linear
from qsam2.benchmark.train_step import one_clip, quantized_models
from qsam2.cli import main
from qsam2.layers.attention import QuantizedAttention
from qsam2.layers.convert import quantizers
from qsam2.layers.weight import QuantizedLayer, QuantLinear
from qsam2.models import build_sam2
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantizer_specs import LSQSpec

SMALL = ["--size", "nano", "--image-size", "64", "--frames", "2", "--repeats", "1", "--compile", "off"]
BITS = 4


# The command


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "WARM_UPS", 0)
    one_click = train_step.RECIPE.prompts.model_copy(update={"correction_clicks": 1})
    monkeypatch.setattr(train_step, "RECIPE", train_step.RECIPE.model_copy(update={"prompts": one_click}))
    out = tmp_path / "new" / "figures.json"
    assert main(["benchmark", "quantizers", *SMALL, "--peers", "aten", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    timed, steps = result["operation"], result["train_step"]
    assert timed.keys() == {"qsam2", "qsam2_lsc", "aten"}
    assert steps.keys() == {"qsam2", "qsam2_linear", "aten"}
    for row in timed.values():
        for key in ("forward_ms", "backward_ms"):
            assert row[key] == pytest.approx(row["weight"][key] + row["activation"][key])
            assert min(row["weight"][key], row["activation"][key]) > 0
    ours = result["float_step"]
    for row in steps.values():
        assert row["time_ratio"] == pytest.approx(row["time_s"] / ours["time_s"]) and row["time_s"] > 0
        assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / ours["peak_bytes"])
        assert row["memory_ratio"] > 1  # weights: all of them hold a quantized copy that the float step does not
    assert steps["qsam2_linear"]["memory_ratio"] < steps["aten"]["memory_ratio"]

    assert result["shapes"] == {"weight": [512, 128], "activation": [2, 4, 4, 128], "clip": [2, 1, 3, 64, 64]}
    assert result["settings"]["repeats"] == {"operation": benchmark.OPERATION_ROUNDS, "train_step": 1}
    assert result["left_out"] == {} and result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["cpu"] and result["threads"] == torch.get_num_threads()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table[1:]] == ["| qsam2", "| qsam2_lsc", "| aten", "| qsam2_linear"]
    assert table[1][1] == f"{timed['qsam2']['forward_ms']:.2f}"
    assert table[1][4] == f"{steps['qsam2']['memory_ratio']:.2f} |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--peers", "brevitsa"],
            "--peers brevitsa: there is no such peer, choose from plain_lsq, aten, brevitas, torchao; "
            "did you mean 'brevitas'?",
        ),
        (["--frames", "0"], "--frames 0: give a whole number from 1 up"),
        (["--repeats", "-1"], "--repeats -1: give a whole number from 1 up"),
        (["--size", "huge"], "model.size='huge' is unknown: choose one of nano,"),
        (["--size", "nano", "--image-size", "100"], "model.image_size=100 is impossible: give a multiple of 32"),
        (["--repeats", "two"], "argument --repeats: invalid int value: 'two'; see qsam2 benchmark quantizers --help"),
        (["model.size=nano"], "'model.size=nano' is a key of a recipe, and this benchmark reads none: leave it out"),
        (["--json", "."], "--json .: is a folder; give the path of a file"),
    ],
)
def test_messages(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "quantizers", "--peers", "aten", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brevitas", None)
    monkeypatch.setitem(sys.modules, "brevitas.nn", None)
    chosen, left_out = choose_peers(["brevitas", "aten", "aten"])
    assert [peer.name for peer in chosen] == ["aten"]
    assert left_out.keys() == {"brevitas"} and "brevitas" in left_out["brevitas"]
    assert left_out["brevitas"].endswith(f"install it with: {INSTALL}")


# Contestants


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    chosen, left_out = choose_peers([request.param])
    if left_out:
        pytest.skip(left_out[request.param])
    return chosen[0]


@pytest.fixture
def x() -> torch.Tensor:
    """Off centre, so that the zero point matters; one sample, whose elements count in the gradient's scale."""
    return torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 16)


@pytest.fixture
def ours(layer: nn.Linear, x: torch.Tensor) -> tuple[Quantizer, Quantizer]:
    weight = build_quantizer(LSQSpec(bits=BITS), "weight", num_channels=16)
    weight.initialize_from(layer.weight / 2)  # many a weight is clipped
    inputs = build_quantizer(LSQSpec(bits=BITS), "activation")
    inputs.state = QuantizerState.OBSERVE
    inputs(x)
    inputs.finish_observing()
    assert (inputs.zero_point > 0).all()
    return weight, inputs


def assert_same_levels(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """The same codes, but for rounding ties, where they may be one apart."""
    apart = ((found - expected) / scale).abs()
    assert (apart > 1e-3).float().mean() < 0.01
    assert apart.max() < 1.001


def test_a_peer_computes_what_we_compute(
    peer: Peer, layer: nn.Linear, x: torch.Tensor, ours: tuple[Quantizer, Quantizer]
) -> None:
    weight_quantizer, input_quantizer = ours
    twin = peer.linear(layer, Ranges.of(*ours))
    their_weight, their_input = peer.quantizers(twin)
    w, x = layer.weight.detach().clone().requires_grad_(), x.clone().requires_grad_()
    weight, found = their_weight(w), their_input(x)
    assert_same_levels(weight, weight_quantizer(w), weight_quantizer.scale.view(-1, 1))
    if peer.name == "torchao":  # a token has the range of its own values and zero: all of them are inside
        range_ = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        assert ((found - x).abs() <= 1.01 * range_ / (2**BITS - 1)).all()
        assert all(len(token.unique()) <= 2**BITS for token in found[0])
    else:
        assert_same_levels(found, input_quantizer(x), input_quantizer.scale)
    torch.testing.assert_close(twin(x), F.linear(found, weight, layer.bias))

    gradient = clear_of_the_clip(w, weight_quantizer)
    (theirs,) = torch.autograd.grad(weight, w, gradient)
    (expected,) = torch.autograd.grad(weight_quantizer(w), w, gradient)
    torch.testing.assert_close(theirs, expected)


def clear_of_the_clip(weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """A gradient of the output that is zero within half a step of the clip.

    There a value counts as clipped (LSQ) or not (those that round before they clip).
    """
    steps = weight.detach() / quantizer.scale.view(-1, 1)
    near = ((steps - quantizer.qmax).abs() < 0.51) | ((steps - quantizer.qmin).abs() < 0.51)
    assert ((steps > quantizer.qmax) & ~near).any() and ((steps < quantizer.qmin) & ~near).any()
    return torch.randn(weight.shape).masked_fill(near, 0.0)


def test_the_learned_steps_get_the_same_gradient(
    peer: Peer, layer: nn.Linear, ours: tuple[Quantizer, Quantizer]
) -> None:
    """Ours learns the logarithm of a step. Brevitas and torchao do not scale its gradient by 1/sqrt(N Qp)."""
    twin = peer.linear(layer, Ranges.of(*ours))
    weight = layer.weight.detach()
    gradient = clear_of_the_clip(weight, ours[0])
    ours[0](weight).backward(gradient)
    peer.quantizers(twin)[0](weight).backward(gradient)
    (learned,) = (value for value in twin.parameters() if value.grad is not None)
    theirs = learned.grad.flatten() * ours[0].scale
    if peer.name == "brevitas":
        theirs = theirs * 2 ** (BITS - 1)  # its parameter is that many steps
    if peer.name in ("brevitas", "torchao"):
        theirs = theirs / (32 * (2 ** (BITS - 1) - 1)) ** 0.5
    torch.testing.assert_close(theirs, ours[0].learned_parameters()[0].grad, rtol=1e-4, atol=1e-6)


def test_the_models_quantize_what_they_say(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = build_sam2("nano", image_size=64)
    nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    names = dict(model.named_parameters()).keys()
    chosen, _ = choose_peers(list(PEERS))
    models = quantized_models(model, one_clip(2, 64), chosen, BITS)
    assert models.keys() == {"qsam2", "qsam2_linear", *(peer.name for peer in chosen)}
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == linears

    full, linear_only = models.pop("qsam2"), models.pop("qsam2_linear")
    kinds = [type(module) for module in full.modules() if isinstance(module, (QuantizedLayer, QuantizedAttention))]
    assert kinds.count(QuantLinear) == len(linears) < len(kinds)
    found = {
        name for name, module in linear_only.named_modules() if isinstance(module, (QuantizedLayer, QuantizedAttention))
    }
    assert found == linears
    for name, quantizer in quantizers(linear_only):
        assert quantizer.state is QuantizerState.QUANTIZE
        assert torch.equal(quantizer.scale, full.get_submodule(name).scale)
    for theirs in models.values():
        assert not [name for name, module in theirs.named_modules() if type(module) is nn.Linear]
        assert names <= dict(theirs.named_parameters()).keys()  # the optimizer sees all weights, and their steps
        assert not {id(value) for value in theirs.parameters()} & {id(value) for value in model.parameters()}


def test_the_layer_is_of_the_third_stage() -> None:
    model = build_sam2("nano", image_size=64)
    layer = stage_3_linear(model)
    shapes: list[Any] = []
    layer.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    with torch.no_grad():
        model.forward_image(torch.zeros(2, 3, 64, 64))
    assert shapes == [(2, 4, 4, 128)] and layer.weight.shape == (512, 128)


# Measuring


def test_contestants_take_turns_and_warm_up() -> None:
    calls: list[str] = []

    def run(name: str) -> tuple[float, ...]:
        calls.append(name)
        return float(len(calls)), 0.5

    found = medians({name: lambda name=name: run(name) for name in "ab"}, 3, progress="test")
    assert calls == ["a", "b"] * (WARM_UPS + 3)
    first = 2 * WARM_UPS + 1  # calls of a: first, first + 2, first + 4
    assert found == {"a": (first + 2, 0.5), "b": (first + 3, 0.5)}


def test_operation_times_forward_and_backward_apart(
    layer: nn.Linear, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(operation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def wait(seconds: float) -> None:
        clock[0] += seconds

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wait(0.25)
            out = x * 2
            out.register_hook(lambda _: wait(0.5))
            return out

    class SlowPeer(Peer):
        name, note = "slow", ""

        def linear(self, layer: nn.Linear, ranges: Ranges) -> nn.Module:
            assert (ranges.bits, ranges.weight_scale.shape, ranges.input_scale.shape) == (BITS, (16,), (1,))
            return Slow()

        def quantizers(self, twin: Any) -> tuple[Any, Any]:
            return twin, twin

    row = measure_operation(layer, x, [SlowPeer()], bits=BITS, repeats=1)["slow"]
    for part in ("weight", "activation"):
        assert row[part] == {"forward_ms": 250, "backward_ms": 500}


def test_peak_memory_is_that_of_the_tensors() -> None:
    """Four are made, two of them live together; small ones hold the numbers."""
    before = torch.zeros(1000, 1000)

    def run() -> None:
        for _ in range(3):
            before.mul(2)
        doubled = before * 2
        torch.add(doubled, 1)

    assert 0 <= peak_allocated_bytes(run) - 2 * before.nbytes < 1000


def test_peak_memory_includes_what_backward_keeps() -> None:
    x = torch.zeros(1000, 1000, requires_grad=True)

    def saves_its_output() -> None:
        x.exp().exp().sum().backward()
        x.grad = None

    def saves_nothing() -> None:
        (x + 1).add(1).sum().backward()
        x.grad = None

    assert peak_allocated_bytes(saves_its_output) > 1.4 * peak_allocated_bytes(saves_nothing)


def test_a_shared_storage_counts_once() -> None:
    x = torch.zeros(10, 10)
    assert held_bytes([x, x.view(100), x[0], torch.zeros(5)]) == 400 + 20


def test_the_machine_is_named() -> None:
    found = machine()
    assert found["cpu"] and {"python", "torch"} <= found["versions"].keys()
