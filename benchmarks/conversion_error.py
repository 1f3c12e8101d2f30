"""What each method makes of heavy-tailed weights at conversion: signal-to-noise ratio, before any training.

    python benchmarks/conversion_error.py [--seed 0]

The weights are those of a second MLP layer, 128 channels of 1792 inputs (SAM2.1-B+'s third stage has 448 of them), std
0.03, per channel, each method with its defaults. Their max|w|/std is 11 (the median of SAM2.1-B+'s second MLP layers),
20 and 39 (the worst one), in two ways: tails in all channels (signed powers of normal values), or rare outliers
(normal, and one weight in 10,000 between 0.3 and 1 of the largest). Prints two markdown tables of 10 log10(sum w^2 /
sum (Q(w) - w)^2), in dB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from qsam2.quantizers import build_quantizer
from qsam2.recipe.quantizer_specs import QuantizerSpec, methods

SHAPE = (128, 1792)
STD = 0.03
TAIL_RATIOS = (11, 20, 39)
BITS = (2, 3, 4, 8)
OUTLIERS = 1e-4


def tail_ratio(weight: Tensor) -> float:
    """max|w| / std."""
    return (weight.abs().max() / weight.std()).item()


def with_tails(ratio: float, generator: torch.Generator) -> Tensor:
    """sign(z) |z|^p of normal z, with the p that gives the ratio."""
    normal = torch.randn(SHAPE, generator=generator)
    return _solve(lambda power: normal.sign() * normal.abs() ** power, ratio)


def with_outliers(ratio: float, generator: torch.Generator) -> Tensor:
    """Normal values, few of which are replaced by outliers, as large as gives the ratio."""
    normal = torch.randn(SHAPE, generator=generator)
    place = torch.randperm(normal.numel(), generator=generator)[: int(OUTLIERS * normal.numel())]
    sizes = torch.linspace(0.3, 1.0, len(place)) * normal.flatten()[place].sign()
    return _solve(lambda size: normal.flatten().index_copy(0, place, 10.0 * size * sizes).view(SHAPE), ratio)


def _solve(weight_of: Callable[[float], Tensor], ratio: float) -> Tensor:
    """The weight of the argument, 1 to 10, at which max/std reaches `ratio`; its std is STD."""
    low, high = 1.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tail_ratio(weight_of(middle)) < ratio else (low, middle)
    weight = weight_of(low)
    return weight * (STD / weight.std())


def snr_db(spec: QuantizerSpec, weight: Tensor) -> float:
    """Signal-to-noise ratio of a weight that is converted by `spec`, in dB."""
    quantizer = build_quantizer(spec, "weight", num_channels=len(weight), name=spec.method)
    quantizer.initialize_from(weight)
    with torch.no_grad():
        noise = (quantizer(weight) - weight).double()
    return (10 * torch.log10(weight.double().square().sum() / noise.square().sum())).item()


def table(make: Callable[[float, torch.Generator], Tensor], seed: int) -> str:
    """A row a method, a column a number of bits and a ratio."""
    weights = {ratio: make(ratio, torch.Generator().manual_seed(seed)) for ratio in TAIL_RATIOS}
    for ratio, weight in weights.items():
        assert abs(tail_ratio(weight) / ratio - 1) < 0.01
    columns = [(bits, ratio) for bits in BITS for ratio in TAIL_RATIOS]
    lines = [
        "| method | " + " | ".join(f"{bits} bits, {ratio}" for bits, ratio in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for name, spec_type in methods().items():
        if "weight" in spec_type.roles:
            specs = (spec_type(method=name, bits=bits) for bits in BITS)
            cells = (f"{snr_db(spec, weights[ratio]):.1f}" for spec in specs for ratio in TAIL_RATIOS)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    for title, make in (("Tails in all channels", with_tails), ("Rare outliers", with_outliers)):
        print(f"{title}: SNR in dB by bits and max|w|/std\n\n{table(make, seed)}\n")


if __name__ == "__main__":
    main()
