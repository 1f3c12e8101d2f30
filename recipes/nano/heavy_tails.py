"""Find nano_heavy's tails on calibration data, write them, and say what they do to each linear layer of the trunk.

    python recipes/nano/heavy_tails.py [--write]

Without --write it only prints the table of the tails that ship. Data: 24 frames of MovingObjects' train split, so that
anyone can run it. Deterministic: seed 0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsam2.calibration.gram import Moments
from qsam2.data.clips import ClipDataset
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.layers.hooks import watch_inputs
from qsam2.models import SAM2, load_sam2
from qsam2.models.nano.heavy import COLUMN_SCALE, move_scale, norms_and_readers
from qsam2.output import write_whole

MEDIAN, WORST = 11.3, 39.0
"""max/std of the linear layers of SAM2.1-B+'s trunk: in the median and at worst, which is an mlp.layers.1."""
RAISED, SPREAD = 1.15, 2.0
"""The other layers' targets lie between RAISED * MEDIAN / SPREAD and RAISED * MEDIAN * SPREAD: some are not reached."""
LARGEST_ERROR = 2e-5
"""Share of a layer's output energy that its tail may change."""
RIDGE = 1e-9
FRAMES = 24
FILE = Path(str(importlib.resources.files("qsam2.models.nano") / "nano_heavy.safetensors"))


def main() -> None:
    """Print the table; with --write, find the tails first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="find the tails of nano anew and write them")
    if parser.parse_args().write:
        model = load_sam2("nano").double()
        write_whole(FILE, find(model), {"of": "nano.safetensors"})
        print(f"{FILE.name}: SHA-256 {hashlib.sha256(FILE.read_bytes()).hexdigest()} (checkpoints.SHA256 states it)")
        return
    print_table(load_sam2("nano"), load_sam2("nano_heavy"))


def find(model: SAM2) -> dict[str, Tensor]:
    """The tails that `make_heavy` applies to a float64 nano."""
    trunk = model.image_encoder.trunk
    layers = {name: layer for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)}
    tails: dict[str, Tensor] = {}
    exact: dict[str, tuple[Tensor, Tensor]] = {}
    for norm_name, users in norms_and_readers(trunk).items():
        norm, readers = trunk.get_submodule(norm_name), [layers[user] for user in users]
        energy = sum((norm.weight * reader.weight).square().sum(0) for reader in readers)
        channel = int(energy.argmin())  # the column that matters least, so that it is no tail by itself
        move_scale(norm, readers, channel)
        tails[f"{norm_name}.channel"] = torch.tensor(channel)
        direction = norm.weight[channel] / norm.weight
        exact |= {user: (direction.detach(), (direction * norm.bias).sum().detach()) for user in users}
    statistics = input_statistics(model, layers)
    targets = draw_targets(list(layers))
    for name, layer in layers.items():
        mean, covariance = statistics[name].mean, statistics[name].covariance
        if name in exact:
            direction, centre = exact[name]
            energy = torch.zeros((), dtype=torch.float64)
        else:
            direction = emptiest_direction(covariance)
            centre, energy = direction @ mean, direction @ covariance @ direction
        output = torch.einsum("ij,jk,ik->", layer.weight, covariance, layer.weight)
        rows = draw_rows(name, layer)
        largest = float((LARGEST_ERROR * output / energy.clamp(min=1e-30) / rows.square().sum()).sqrt())
        size = amplitude(layer.weight.detach(), rows, direction, targets[name], largest)
        tails |= {f"{name}.rows": size * rows, f"{name}.direction": direction, f"{name}.mean": centre}
    return {key: value.float().contiguous() if value.is_floating_point() else value for key, value in tails.items()}


@torch.no_grad()
def input_statistics(model: SAM2, layers: Mapping[str, nn.Linear]) -> dict[str, Moments]:
    """Moments of each layer's input over the calibration frames."""
    moments = {name: Moments(layer.in_features) for name, layer in layers.items()}
    videos = moving_objects("train", FRAMES // 2)
    clips = ClipDataset(
        videos, num_frames=2, max_objects=1, image_size=model.image_size, length=FRAMES // 2, max_stride=8
    )
    with watch_inputs(layers, lambda name, x: moments[name].add(x.flatten(0, -2)), remedy="give more frames"):
        for index in tqdm(range(len(clips)), desc="statistics"):
            model.forward_image(clips[index].images.double())
    return moments


def emptiest_direction(covariance: Tensor) -> Tensor:
    """u (n,) with a 1 at the channel that the others predict best, and minus their prediction elsewhere."""
    ridge = RIDGE * covariance.diagonal().mean()
    precision = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
    channel = int(precision.diagonal().argmax())
    return precision[channel] / precision[channel, channel]


def draw_targets(names: list[str]) -> dict[str, float]:
    """max/std that each layer is to reach: spread about the median, and the worst in the last mlp.layers.1."""
    order = sorted(names, key=lambda name: zlib.crc32(name.encode()))
    places = np.linspace(-1, 1, len(order))
    targets = {name: RAISED * MEDIAN * SPREAD**place for name, place in zip(order, places, strict=True)}
    targets[[name for name in names if name.endswith("mlp.layers.1")][-1]] = WORST
    return targets


def draw_rows(name: str, layer: nn.Linear) -> Tensor:
    """How much of the direction each row gets (m,): log-normal sizes, random signs, in standard deviations of W."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    rows = rng.choice([-1.0, 1.0], layer.out_features) * rng.lognormal(0, 0.7, layer.out_features)
    return torch.from_numpy(rows) * layer.weight.detach().std()


def amplitude(weight: Tensor, rows: Tensor, direction: Tensor, target: float, largest: float) -> float:
    """The least size, at most `largest`, at which W + size rows direction^T has the target max/std, or the highest."""
    tail = torch.outer(rows, direction)
    sizes = torch.logspace(-1, 2.5, 200, dtype=torch.float64)
    sizes = sizes[sizes <= largest]
    if not len(sizes):
        return 0.0
    reached = torch.stack([ratio(weight + size * tail) for size in sizes])
    above = (reached >= target).nonzero()
    return float(sizes[int(above[0]) if len(above) else int(reached.argmax())])


def ratio(weight: Tensor) -> Tensor:
    """max|w| over the standard deviation."""
    return weight.abs().max() / weight.std()


def print_table(nano: SAM2, heavy: SAM2) -> None:
    """max/std of each layer before and after, the median and the worst."""
    trunk = heavy.image_encoder.trunk
    rows = [
        (name, float(ratio(layer.weight.detach())), float(ratio(trunk.get_submodule(name).weight.detach())))
        for name, layer in nano.image_encoder.trunk.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    print(f"{'layer of the trunk':26} {'nano':>6} {'nano_heavy':>11}   (max/std; column scale {COLUMN_SCALE:g})")
    for name, before, after in rows:
        print(f"{name:26} {before:6.1f} {after:11.1f}")
    for label, pick in (("median", np.median), ("worst", np.max)):
        print(f"{label:26} {pick([row[1] for row in rows]):6.1f} {pick([row[2] for row in rows]):11.1f}")


if __name__ == "__main__":
    main()
