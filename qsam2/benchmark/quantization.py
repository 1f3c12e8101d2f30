"""Cost of fake quantization beside other libraries: the operation alone, and a whole training step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam2.benchmark.measure import Seconds, machine, medians
from qsam2.benchmark.peers import FakeQuantize, Peer, Ranges, choose_peers
from qsam2.benchmark.train_step import CLICKS, measure_train_step, one_clip
from qsam2.errors import UserError
from qsam2.models import SAM2, build_sam2
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.quantizers.kernels import MIN_STEPS, Compile, choose_kernels
from qsam2.recipe.quantizer_specs import LSCSpec, LSQSpec, QuantizerSpec

BITS = 4
OPERATION_ROUNDS = 5
"""How often the operation is repeated for each repetition of the far longer training step."""

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
    for flag, number in (("--frames", frames), ("--repeats", repeats)):
        if number < 1:
            raise UserError(f"{flag} {number}: give a whole number from 1 up")
    chosen, left_out = choose_peers(peers)
    torch.manual_seed(0)
    model = build_sam2(size, image_size=image_size)
    # Random weights see no object; without this all masks would be constant.
    nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    layer, batch = stage_3_linear(model), one_clip(frames, image_size)
    compiled = choose_kernels(compile, MIN_STEPS, torch.device("cpu"))
    x = torch.randn(frames, image_size // 16, image_size // 16, layer.in_features)
    operation = measure_operation(layer, x, chosen, bits=BITS, repeats=OPERATION_ROUNDS * repeats)
    float_step, train_step = measure_train_step(model, batch, chosen, bits=BITS, repeats=repeats)
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
            "clicks": CLICKS,
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


def stage_3_linear(model: SAM2) -> nn.Linear:
    """The first MLP layer of the last block in the third of Hiera's four stages; its input has stride 16."""
    trunk = model.image_encoder.trunk
    return trunk.blocks[trunk.stage_ends[2]].mlp.layers[0]


def measure_operation(layer: nn.Linear, x: Tensor, peers: Sequence[Peer], *, bits: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of fake-quantizing a layer's weight, symmetric per channel, and its input x, affine per tensor.

    Returns {name: forward_ms, backward_ms, and of what they are the sum: the same two of `weight` and `activation`}.
    """
    ours = {name: (_of_weight(spec, layer), _of_input(spec, x)) for name, spec in _ours(bits).items()}
    ranges = Ranges.of(*ours["qsam2"])
    contestants: dict[str, tuple[FakeQuantize, FakeQuantize]] = {**ours}
    for peer in peers:
        contestants[peer.name] = peer.quantizers(peer.linear(copy.deepcopy(layer), ranges))
    rows: dict[str, Any] = {name: {} for name in contestants}
    for index, (role, value) in enumerate({"weight": layer.weight, "activation": x}.items()):
        runs = {name: _forward_backward(both[index], value) for name, both in contestants.items()}
        for name, seconds in medians(runs, repeats, progress=f"operation, {role}").items():
            rows[name][role] = dict(zip(("forward_ms", "backward_ms"), (1e3 * s for s in seconds), strict=True))
    for row in rows.values():
        row |= {key: row["weight"][key] + row["activation"][key] for key in ("forward_ms", "backward_ms")}
    return rows


def _ours(bits: int) -> dict[str, QuantizerSpec]:
    """The learned step, which is what the peers have, and what the training step uses, running statistics included."""
    return {"qsam2": LSQSpec(bits=bits), "qsam2_lsc": LSCSpec(bits=bits)}


def _of_weight(spec: QuantizerSpec, layer: nn.Linear) -> Quantizer:
    quantizer = build_quantizer(spec, "weight", num_channels=layer.out_features)
    quantizer.initialize_from(layer.weight)
    return quantizer


def _of_input(spec: QuantizerSpec, x: Tensor) -> Quantizer:
    quantizer = build_quantizer(spec, "activation")
    quantizer.state = QuantizerState.OBSERVE
    quantizer(x)
    quantizer.finish_observing()
    return quantizer


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
