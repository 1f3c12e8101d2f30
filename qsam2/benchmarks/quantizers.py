"""What fake quantization costs, beside other libraries: the operation alone, and a whole training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qsam2.benchmarks.measure import machine
from qsam2.benchmarks.operation import measure_operation, stage_3_linear
from qsam2.benchmarks.peers import choose_peers
from qsam2.benchmarks.train_step import CLICKS, measure_train_step, one_clip
from qsam2.errors import UserError
from qsam2.models import build_sam2
from qsam2.quantizers.kernels import MIN_STEPS, Compile, choose_kernels

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
        f"operation: weight {shapes['weight']} a channel + activation {shapes['activation']} a tensor, "
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
