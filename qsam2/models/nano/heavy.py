"""nano_heavy (ours): the same function as nano, with weight tails as heavy as those of the official models.

Linear layers of the trunk get large weights along a direction u in which their input x has (almost) no variance:
W' = W + a u^T, b' = b - a (u . mean x). After a LayerNorm with gain g and bias beta such a u is known exactly:
sum_j (x_j - beta_j) / g_j = 0. Before that, one channel of the norm is divided by a power of two and the matching
column of its readers multiplied by it (exact), which turns u towards that column. For other inputs u is the direction
that the remaining input predicts best on calibration data. `recipes/nano/heavy_tails.py` writes the file of directions
that this module applies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sam2.modeling.backbones.hieradet import Hiera
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.models.sam2 import SAM2

COLUMN_SCALE = 4.0
"""Factor between gain and column; a power of two keeps their product exact."""


def norms_and_readers(trunk: Hiera) -> dict[str, list[str]]:
    """{LayerNorm of a Hiera trunk: the linear layers that read only its output}, by name."""
    names = {name for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)}
    readers: dict[str, list[str]] = {}
    for index in range(len(trunk.blocks)):
        block = f"blocks.{index}"
        both = [f"{block}.attn.qkv", f"{block}.proj"]  # the shortcut projection of a widening block reads the norm, too
        readers[f"{block}.norm1"] = [name for name in both if name in names]
        readers[f"{block}.norm2"] = [f"{block}.mlp.layers.0"]
    return readers


@torch.no_grad()
def move_scale(norm: nn.LayerNorm, readers: list[nn.Linear], channel: int, scale: float = COLUMN_SCALE) -> None:
    """Divide one channel of a norm by `scale` and multiply the readers' column by it: the same function."""
    norm.weight[channel] /= scale
    norm.bias[channel] /= scale
    for layer in readers:
        layer.weight[:, channel] *= scale


@torch.no_grad()
def add_tail(layer: nn.Linear, rows: Tensor, direction: Tensor, mean: Tensor) -> None:
    """Add rows direction^T to the weight, and subtract its mean contribution from the bias.

    Args:
        rows: (out_features,); direction: (in_features,); mean: (), mean of direction . x over the data.
    """
    layer.weight += torch.outer(rows, direction)
    assert layer.bias is not None
    layer.bias.sub_(rows * mean)


def make_heavy(model: SAM2, tails: Mapping[str, Tensor]) -> None:
    """Turn nano into nano_heavy, in place.

    Args:
        tails: per LayerNorm of the trunk `NAME.channel`; per linear layer `NAME.rows`, `NAME.direction`, `NAME.mean`.

    Raises:
        UserError: the tails belong to another model.
    """
    trunk = model.image_encoder.trunk
    readers = norms_and_readers(trunk)
    layers = {name: layer for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)}
    expected = {f"{name}.channel" for name in readers}
    expected |= {f"{name}.{part}" for name in layers for part in ("rows", "direction", "mean")}
    shapes = [
        (tails[f"{name}.rows"].shape + tails[f"{name}.direction"].shape) == layer.weight.shape
        for name, layer in layers.items()
        if f"{name}.rows" in tails and f"{name}.direction" in tails
    ]
    if set(tails) != expected or not all(shapes):
        raise UserError("the file of heavy tails fits another model: write it anew with recipes/nano/heavy_tails.py")
    for name, users in readers.items():
        move_scale(trunk.get_submodule(name), [layers[user] for user in users], int(tails[f"{name}.channel"]))
    for name, layer in layers.items():
        add_tail(layer, tails[f"{name}.rows"], tails[f"{name}.direction"], tails[f"{name}.mean"])
