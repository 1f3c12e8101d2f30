"""The fake-quant operation alone: a weight of the model and its input, forward and backward."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam2.benchmarks.measure import Seconds, medians
from qsam2.benchmarks.peers import FakeQuantize, Peer, Ranges
from qsam2.models import SAM2
from qsam2.quantizers import Quantizer, QuantizerState, build_quantizer
from qsam2.recipe.quantizers import LSCSpec, LSQSpec, QuantizerSpec


def stage_3_linear(model: SAM2) -> nn.Linear:
    """The first MLP layer of the last block in the third of Hiera's four stages; its input has stride 16."""
    trunk = model.image_encoder.trunk
    return trunk.blocks[trunk.stage_ends[2]].mlp.layers[0]


def measure_operation(layer: nn.Linear, x: Tensor, peers: Sequence[Peer], *, bits: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of fake-quantizing a layer's weight, symmetric a channel, and its input x, affine a tensor.

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
