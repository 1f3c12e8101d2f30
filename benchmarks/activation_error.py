"""What the activations of a model keep of few bits at calibration, by how range and grid are chosen.

    python benchmarks/activation_error.py [--size nano] [--clips 6]

Calibrates on generated clips and prints a markdown table: the mean over activation quantizers of 10 log10(sum x^2 /
sum (Q(x) - x)^2) in dB, apart for what hardly reaches below zero (not a tenth as far as above), as after a GELU or
ReLU, and for the rest.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean

import torch
from torch import Tensor

from qsam2.calibration.activation_ranges import find_sam2_ranges
from qsam2.data.sources import open_train
from qsam2.layers.convert import convert
from qsam2.loading import load_float
from qsam2.pipeline import calibration_data
from qsam2.quantizers import Quantizer
from qsam2.quantizers.grid import Grid
from qsam2.quantizers.mse import best_bounds, best_clip_ratio, least_error_grid
from qsam2.quantizers.observers import Distribution
from qsam2.quantizers.passes import to_levels
from qsam2.recipe import build_recipe

ROWS = ("one ratio for both bounds", "bounds of their own", "and zero on a code or between two")


def seen_by_quantizers(size: str, bits: int, clips: int) -> dict[str, Distribution]:
    """What the quantizer of each activation of so many bits saw at calibration."""
    recipe = build_recipe(
        {
            "name": "activation-error",
            "model": {"size": size},
            "data": {"train": "moving_objects"},
            "calibrate": {"clips": clips, "num_frames": 4},
            "quantize": {"activations": {"method": "mse", "bits": bits}},
        }
    )
    assert recipe.quantize is not None
    model = load_float(recipe)
    convert(model, recipe.quantize)
    seen: dict[str, Distribution] = {}
    start = Quantizer._start_quantizing

    def remember(quantizer: Quantizer, distribution: Distribution) -> None:
        if quantizer.bits == bits:
            seen[quantizer.name] = distribution
        start(quantizer, distribution)

    Quantizer._start_quantizing = remember  # type: ignore[method-assign]
    try:
        find_sam2_ranges(model, calibration_data(model, open_train(recipe), recipe))
    finally:
        Quantizer._start_quantizing = start  # type: ignore[method-assign]
    return seen


def snr_db(seen: Distribution, grid: Grid, bounds: tuple[Tensor, Tensor]) -> float:
    """Signal-to-noise ratio in dB of what was seen."""
    scale, zero_point = (row[:, None] for row in grid.from_bounds(*bounds))
    values = to_levels(seen.values, scale, grid.qmin - zero_point, grid.qmax - zero_point, grid.mid_rise) * scale
    noise = ((values - seen.values).square() * seen.counts).sum()
    return 10 * math.log10(float((seen.values.square() * seen.counts).sum() / noise))


def rows(seen: Distribution, bits: int) -> tuple[float, float, float]:
    """The decibels of `ROWS`."""
    affine = Grid(bits, symmetric=False, mid_rise=False)
    lower, upper = seen.minimum.clamp(max=0.0), seen.maximum.clamp(min=0.0)
    ratio = best_clip_ratio(seen, affine, lambda ratio: (lower * ratio, upper * ratio))
    chosen = least_error_grid(seen, affine)
    return (
        snr_db(seen, affine, (lower * ratio, upper * ratio)),
        snr_db(seen, affine, best_bounds(seen, affine)),
        snr_db(seen, chosen, best_bounds(seen, chosen)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano", help="of the model (default: nano)")
    parser.add_argument("--clips", type=int, default=6, help="to calibrate on (default: 6)")
    args = parser.parse_args()
    torch.manual_seed(0)
    lines: dict[str, list[str]] = {row: [] for row in ROWS}
    titles = []
    for bits in (2, 3, 4):
        seen = seen_by_quantizers(args.size, bits, args.clips)
        for kind, one_sided in (("one side", True), ("both sides", False)):
            found = [
                rows(each, bits)
                for each in seen.values()
                if bool((-each.minimum < each.maximum / 10).all()) == one_sided
            ]
            titles.append(f"{bits} bits, {kind} ({len(found)})")
            for row, decibels in zip(ROWS, zip(*found, strict=True), strict=True):
                lines[row].append(f"{mean(decibels):.1f}")
    print("| dB | " + " | ".join(titles) + " |\n|---" + "|---:" * len(titles) + "|")
    for row, cells in lines.items():
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
