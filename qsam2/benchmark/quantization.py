"""Cost of fake quantization beside other libraries: the operation alone, and a whole training step.

The step is forward, loss, backward and AdamW of SAM2 for one object, with a click and Meta's number of corrections on
the first frame. `qsam2` quantizes everything that the default rules name, `qsam2_linear` and the peers the linear
layers only, all from the same calibrated ranges.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.benchmark.measure import (
    Seconds,
    check_positive,
    held_bytes,
    machine,
    medians,
    peak_allocated_bytes,
    random_sam2,
)
from qsam2.benchmark.peers import FakeQuantize, Peer, choose_peers
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.layers.convert import convert
from qsam2.layers.weight import QuantLinear
from qsam2.models import SAM2
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.quantizers.kernels import MIN_STEPS, Compile, choose_kernels
from qsam2.recipe.quantize import QuantizeRecipe, Rule
from qsam2.recipe.quantizer_specs import LSCSpec, LSQSpec, QuantizerSpec
from qsam2.recipe.train import PromptRecipe, TrainRecipe
from qsam2.train.losses import segmentation_loss
from qsam2.train.optimizer import parameter_groups
from qsam2.train.video_training import attention_backend, prompted_forward, set_dropout, set_prompts

BITS = 4
OPERATION_ROUNDS = 5
"""How often the operation is repeated for each repetition of the far longer training step."""

RECIPE = TrainRecipe(prompts=PromptRecipe(point=1.0, box=0.0, conditioning_frames=1, correction_frames=1))
OURS = {
    "qsam2": "operation: learned steps (LSQ), as the peers; training step: LSC on all that the default rules quantize",
    "qsam2_lsc": "the method of the training step, running statistics included",
    "qsam2_linear": "LSC on the linear layers only, which is what the peers quantize",
}


def benchmark_quantizers(
    *, size: str, image_size: int, frames: int, repeats: int, compile: Compile, peers: Sequence[str]
) -> dict[str, Any]:
    """Measures on the CPU, all in this process and in turn, and returns medians of `repeats` rounds after warm-ups.

    `operation`: see `measure_operation`; `train_step` and `float_step`: see `measure_train_step`; and which peers were
    left out, how each quantizes, shapes, settings and the machine. `compile` as `trainer.compile`, in a long training.

    Raises:
        UserError: a number that is not positive, an unknown size or peer, an impossible image size.
    """
    check_positive(frames=frames, repeats=repeats)
    chosen, left_out = choose_peers(peers)
    model = random_sam2(size, image_size)
    layer, batch = stage_3_linear(model), one_clip(frames, image_size)
    compiled = choose_kernels(compile, MIN_STEPS, torch.device("cpu"))
    x = torch.randn(frames, image_size // 16, image_size // 16, layer.in_features)
    operation = measure_operation(layer, x, chosen, repeats=OPERATION_ROUNDS * repeats)
    float_step, train_step = measure_train_step(model, batch, chosen, repeats=repeats)
    return {
        "operation": operation,
        "train_step": train_step,
        "float_step": float_step,
        "left_out": left_out,
        "notes": {**OURS, **{peer.name: peer.note for peer in chosen}},
        "shapes": {"weight": [*layer.weight.shape], "activation": [*x.shape], "clip": [*batch.img_batch.shape]},
        "settings": {
            "size": size,
            "bits": BITS,
            "objects": 1,
            "clicks": 1 + RECIPE.prompts.correction_clicks,
            "dtype": "float32",
            "kernels": "compiled" if compiled else "eager",
            "repeats": {"operation": OPERATION_ROUNDS * repeats, "train_step": repeats},
        },
        **machine(),
    }


def markdown_table(result: dict[str, Any]) -> str:
    """The figures of `benchmark_quantizers` as text: a row each for qsam2 and its peers."""
    settings, shapes, float_step = (result[key] for key in ("settings", "shapes", "float_step"))
    repeats = settings["repeats"]
    lines = [
        f"{result['cpu']}, {result['threads']} threads, torch {result['versions']['torch']}, {settings['bits']} bits, "
        f"our kernels {settings['kernels']}",
        f"operation: weight {shapes['weight']} per channel + activation {shapes['activation']} per tensor, "
        f"medians of {repeats['operation']}",
        f"training step: {settings['size']}, clip {shapes['clip']}, {settings['clicks']} clicks, "
        f"medians of {repeats['train_step']}; float: {float_step['time_s']:.2f} s, "
        f"{float_step['peak_bytes'] / 1e6:.0f} MB",
        "",
        "| name | forward ms | backward ms | step time / float | step memory / float |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys((*result["operation"], *result["train_step"])):
        figures = {**result["operation"].get(name, {}), **result["train_step"].get(name, {})}
        keys = ("forward_ms", "backward_ms", "time_ratio", "memory_ratio")
        cells = [f"{figures[key]:.2f}" if key in figures else "" for key in keys]
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += [""] + [f"{name}: {note}" for name, note in result["notes"].items()]
    lines += [f"{name} is left out: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


# The operation


def stage_3_linear(model: SAM2) -> nn.Linear:
    """The first MLP layer of the last block in the third of Hiera's four stages; its input has stride 16."""
    trunk = model.image_encoder.trunk
    return trunk.blocks[trunk.stage_ends[2]].mlp.layers[0]


def measure_operation(layer: nn.Linear, x: Tensor, peers: Sequence[Peer], *, repeats: int) -> dict[str, Any]:
    """Milliseconds of fake-quantizing a layer's weight, symmetric per channel, and its input x, affine per tensor.

    Returns {name: forward_ms, backward_ms, and of what they are the sum: the same two of `weight` and `activation`}.
    """
    ours = _calibrated(LSQSpec(bits=BITS), layer, x)
    contestants: dict[str, tuple[FakeQuantize, FakeQuantize]] = {"qsam2": ours}
    contestants["qsam2_lsc"] = _calibrated(LSCSpec(bits=BITS), layer, x)
    for peer in peers:
        contestants[peer.name] = peer.quantizers(peer.linear(copy.deepcopy(layer), *ours))
    rows: dict[str, Any] = {name: {} for name in contestants}
    for index, (role, value) in enumerate({"weight": layer.weight, "activation": x}.items()):
        runs = {name: _forward_backward(both[index], value) for name, both in contestants.items()}
        for name, (forward, backward) in medians(runs, repeats, progress=f"operation, {role}").items():
            rows[name][role] = {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward}
    for row in rows.values():
        row |= {key: row["weight"][key] + row["activation"][key] for key in ("forward_ms", "backward_ms")}
    return rows


def _calibrated(spec: QuantizerSpec, layer: nn.Linear, x: Tensor) -> tuple[Quantizer, Quantizer]:
    """Our quantizers of a layer's weight and input."""
    weight = build_quantizer(spec, "weight", num_channels=layer.out_features)
    weight.initialize_from(layer.weight)
    inputs = build_quantizer(spec, "activation")
    inputs.state = QuantizerState.OBSERVE
    inputs(x)
    inputs.finish_observing()
    return weight, inputs


def _forward_backward(quantize: FakeQuantize, value: Tensor) -> Callable[[], Seconds]:
    x = value.detach().clone().requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> Seconds:
        started = time.perf_counter()
        out = quantize(x)
        between = time.perf_counter()
        out.backward(gradient)
        ended = time.perf_counter()
        x.grad = None
        return between - started, ended - between

    return run


# The training step


def measure_train_step(
    model: SAM2, batch: BatchedVideoDatapoint, peers: Sequence[Peer], *, repeats: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The float step: time_s, peak_bytes; and {name: the same two, and time_ratio, memory_ratio to the float step}.

    Peak memory: parameters, buffers and the optimizer's state, and what the step allocates above them.
    """
    models = {"float": model, **quantized_models(model, batch, peers)}
    steps = {name: TrainStep(contestant, batch) for name, contestant in models.items()}
    seconds = medians(steps, repeats, progress="training step")
    rows = {name: {"time_s": seconds[name][0], "peak_bytes": step.peak_bytes()} for name, step in steps.items()}
    ours = rows.pop("float")
    for row in rows.values():
        row["time_ratio"] = row["time_s"] / ours["time_s"]
        row["memory_ratio"] = row["peak_bytes"] / ours["peak_bytes"]
    return ours, rows


def one_clip(frames: int, image_size: int) -> BatchedVideoDatapoint:
    """A generated clip with one object."""
    videos = moving_objects("train", 1, num_frames=frames, max_objects=1)
    clips = ClipDataset(videos, num_frames=frames, max_objects=1, image_size=image_size, length=1, augment=False)
    return collate_clips([clips[0]])


def quantized_models(model: SAM2, batch: BatchedVideoDatapoint, peers: Sequence[Peer]) -> dict[str, SAM2]:
    """Copies of a float model, quantized by us and by the peers."""
    spec = LSCSpec(bits=BITS)
    ours, linear_only = copy.deepcopy(model), copy.deepcopy(model)
    rows = convert(ours, QuantizeRecipe(weights=spec, activations=spec))
    find_ranges(ours, lambda points: prompted_forward(ours, batch, points=points), (False, True))

    rules = tuple(Rule(match=row.name, keep_float=True) for row in rows if row.kind != nn.Linear.__name__)
    convert(linear_only, QuantizeRecipe(weights=spec, activations=spec, rules=rules))
    linear_only.load_state_dict(ours.state_dict(), strict=False)

    models = {"qsam2": ours, "qsam2_linear": linear_only}
    linears = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)}
    for peer in peers:
        models[peer.name] = theirs = copy.deepcopy(model)
        for name, layer in linears.items():
            assert layer.weight_quantizer is not None and layer.input_quantizer is not None
            twin = peer.linear(theirs.get_submodule(name), layer.weight_quantizer, layer.input_quantizer)
            theirs.set_submodule(name, twin)
    return models


class TrainStep:
    """The step of one model, the same prompts each time. Calling it returns its seconds."""

    def __init__(self, model: SAM2, batch: BatchedVideoDatapoint) -> None:
        self.model, self.batch = model.train(), batch
        set_prompts(model, RECIPE.prompts)
        set_dropout(model, 0.0)
        self.loss = segmentation_loss(RECIPE.losses)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE))

    def __call__(self) -> Seconds:
        self.model.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        started = time.perf_counter()
        with attention_backend(torch.device("cpu"), self.model.image_size):
            loss = self.loss(self.model(self.batch), self.batch.masks)["core_loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (time.perf_counter() - started,)

    def peak_bytes(self) -> int:
        """Memory while a step runs: what the model and the optimizer hold, and what the step allocates above it."""
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [value for state in self.optimizer.state.values() for value in state.values()]
        return held_bytes(held) + peak_allocated_bytes(self)
