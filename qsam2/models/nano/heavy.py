"""nano_heavy: nano's function with weights whose tails are as heavy as the official models' (ours).

The trunk's linear layers get large weights where their input carries no energy: W' = W + a u^T, b' = b - a (u . mean
x), with a direction u along which the input x (almost) never leaves its mean. Behind a LayerNorm with gain g such a u
is exact: sum_j (x_j - beta_j) / g_j = 0. First, exactly, the gain of one channel of that norm is divided by a power of
two and its column of the layers that read it multiplied by the same, which leans u towards that column. Elsewhere u is
the direction that the rest of the input predicts best, found on calibration data by `benchmarks/nano_heavy.py`, which
writes the small file of directions that this module applies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sam2.modeling.backbones.hieradet import Hiera
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.models.sam2 import SAM2

COLUMN_SCALE = 4.0
"""A power of two: moving it between a gain and a column changes no bit of their product."""


def norms_and_readers(trunk: Hiera) -> dict[str, list[str]]:
    """Each LayerNorm of a Hiera trunk with the linear layers that read it alone, by name."""
    names = {name for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)}
    readers: dict[str, list[str]] = {}
    for index in range(len(trunk.blocks)):
        block = f"blocks.{index}"
        both = [f"{block}.attn.qkv", f"{block}.proj"]  # the shortcut of a block that widens reads the norm, too
        readers[f"{block}.norm1"] = [name for name in both if name in names]
        readers[f"{block}.norm2"] = [f"{block}.mlp.layers.0"]
    return readers


@torch.no_grad()
def move_scale(norm: nn.LayerNorm, readers: list[nn.Linear], channel: int) -> None:
    """Divide one channel of a norm by `COLUMN_SCALE` and multiply the readers' column by it: the same function."""
    norm.weight[channel] /= COLUMN_SCALE
    norm.bias[channel] /= COLUMN_SCALE
    for layer in readers:
        layer.weight[:, channel] *= COLUMN_SCALE


@torch.no_grad()
def add_tail(layer: nn.Linear, rows: Tensor, direction: Tensor, mean: Tensor) -> None:
    """W + rows direction^T, and a bias that takes back what it adds to an input whose `direction` part is `mean`.

    Args:
        rows: (out_features,); direction: (in_features,); mean: () of direction . x over the data.
    """
    layer.weight += torch.outer(rows, direction)
    assert layer.bias is not None
    layer.bias.sub_(rows * mean)


def make_heavy(model: SAM2, tails: Mapping[str, Tensor]) -> None:
    """Turn nano into nano_heavy, in place.

    Args:
        tails: a LayerNorm's `NAME.channel`; a linear layer's `NAME.rows`, `NAME.direction` and `NAME.mean`; names are
            those of the trunk's modules.

    Raises:
        UserError: the tails are of another model.
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
        raise UserError("the file of heavy tails fits another model: write it anew with benchmarks/nano_heavy.py")
    for name, users in readers.items():
        move_scale(trunk.get_submodule(name), [layers[user] for user in users], int(tails[f"{name}.channel"]))
    for name, layer in layers.items():
        add_tail(layer, tails[f"{name}.rows"], tails[f"{name}.direction"], tails[f"{name}.mean"])
