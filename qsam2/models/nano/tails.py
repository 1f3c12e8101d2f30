"""nano_tails (ours): the same function as nano, with weight tails that carry a part of it.

`nano_heavy` has its tails along directions that the inputs (almost) never take, so that least-norm calibration removes
them at no cost. Here a factor moves between two layers, along the channels that matter most to both:

    LayerNorm gain and bias / s,  columns of its readers (qkv, the shortcut, mlp.layers.0) * s
    rows of v / s,                the same columns of attn.proj * s
    rows of k / Q,                the same rows of q * Q, one channel per head

Every product stays what it was, and as the factors are powers of two, so do its last bits. The large columns read the
smallest inputs: a range that holds them is coarse for all other weights, and clipping them loses what matters most.
No factor passes a GELU, so mlp.layers.1 keeps nano's own weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sam2.modeling.backbones.hieradet import MultiScaleAttention
from torch import Tensor, nn

from qsam2.models.nano.heavy import move_scale, norms_and_readers
from qsam2.models.sam2 import SAM2

MEDIAN, SPREAD = 11.3, 2.0
"""max/std of the linear layers of SAM2.1-B+'s trunk in the median; targets lie between MEDIAN / SPREAD and * SPREAD."""
ONE_OF = 32
"""One of so many channels gets a factor."""
SCALES = tuple(2.0**power for power in range(1, 8))
QUERY_SCALE = 2.0


def make_tails(model: SAM2) -> None:
    """Turn nano into nano_tails, in place."""
    trunk = model.image_encoder.trunk
    attentions = {name: module for name, module in trunk.named_modules() if isinstance(module, MultiScaleAttention)}
    places: dict[str, Callable[[float], object]] = {}
    for name, readers in norms_and_readers(trunk).items():
        places[readers[0]] = _norm_place(trunk.get_submodule(name), [trunk.get_submodule(each) for each in readers])
    places |= {f"{name}.proj": _value_place(attention) for name, attention in attentions.items()}
    targets = MEDIAN * SPREAD ** np.linspace(-1, 1, len(places))
    for name, target in zip(sorted(places, key=lambda name: zlib.crc32(name.encode())), targets, strict=True):
        layer = trunk.get_submodule(name)
        reached = []
        for scale in SCALES:
            places[name](scale)
            reached.append(ratio(layer.weight))
            places[name](1 / scale)
        best = next((index for index, value in enumerate(reached) if value >= target), int(np.argmax(reached)))
        places[name](SCALES[best])
    for attention in attentions.values():
        _scale_queries(attention)


def ratio(weight: Tensor) -> float:
    """max|w| over the standard deviation."""
    return float((weight.abs().max() / weight.std()).detach())


def _norm_place(norm: nn.LayerNorm, readers: Sequence[nn.Linear]) -> Callable[[float], object]:
    energy = sum((norm.weight * reader.weight).square().sum(0) for reader in readers)
    assert isinstance(energy, Tensor)
    channels = _largest(energy)
    return lambda scale: [move_scale(norm, list(readers), channel, scale) for channel in channels]


def _value_place(attention: MultiScaleAttention) -> Callable[[float], object]:
    rows, values = _parts(attention)[2], attention.proj.weight
    channels = _largest(rows.weight.square().sum(1) * values.square().sum(0))

    @torch.no_grad()
    def move(scale: float) -> None:
        for channel in channels:
            rows.divide(channel, scale)
            values[:, channel] *= scale

    return move


def _largest(energy: Tensor) -> list[int]:
    """The channels of largest energy, one of `ONE_OF`."""
    return energy.topk(max(len(energy) // ONE_OF, 1)).indices.tolist()


@torch.no_grad()
def _scale_queries(attention: MultiScaleAttention) -> None:
    """Of each head, the channel whose products of q and k are the largest."""
    queries, keys, _ = _parts(attention)
    energy = (queries.weight.square().sum(1) * keys.weight.square().sum(1)).view(attention.num_heads, -1)
    for head, channel in enumerate(energy.argmax(1).tolist()):
        row = head * energy.shape[1] + channel
        queries.divide(row, 1 / QUERY_SCALE)
        keys.divide(row, QUERY_SCALE)


class _Rows:
    """Rows of q, k or v within the joint layer, as views."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def divide(self, row: int, scale: float) -> None:
        self.weight[row] /= scale
        self.bias[row] /= scale


def _parts(attention: MultiScaleAttention) -> list[_Rows]:
    weights, biases = attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3)
    return [_Rows(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
