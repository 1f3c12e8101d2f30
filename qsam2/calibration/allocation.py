"""Mixed precision: bits of each layer under a budget of average bits.

minimise sum_l cost_l(b_l)  subject to  sum_l n_l b_l <= B sum_l n_l,  n_l weights of layer l, B the average bits.

Costs are an importance times 2^-b (Mix-QSAM2), or losses measured by `qsam2 sensitivity` (ours).
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict

from qsam2.calibration.forward import run_sample
from qsam2.errors import UserError
from qsam2.inputs import read_json
from qsam2.layers.convert import QUANT_LAYERS
from qsam2.layers.hooks import watch_inputs
from qsam2.recipe.quantize import QuantizeRecipe, Rule
from qsam2.run import Run

log = logging.getLogger("qsam2")
Sample = TypeVar("Sample")
Costs = dict[str, dict[int, float]]
"""{layer or group: {bits: cost}}."""
GROUP = re.compile(
    r"image_encoder\.trunk\.(blocks\.\d+|patch_embed)|image_encoder\.neck|memory_attention\.layers\.\d+|"
    r"sam_mask_decoder\.transformer|[^.]+"
)
"""Parts of SAM 2 whose sensitivity is measured: a block of the trunk, a layer of the memory attention, ..."""
SENSITIVITY = "the result of a sensitivity measurement"
MEASURE = "run qsam2 sensitivity on this model and give its JSON"


class Measurement(TypedDict):
    """Loss of one group's weights or activations at some bits."""

    group: str
    part: Literal["weights", "activations"]
    bits: Annotated[int, Field(ge=1, le=32)]
    loss: Annotated[float, Field(allow_inf_nan=False)]


class Sensitivity(TypedDict):
    """File that `qsam2 sensitivity` writes."""

    groups: list[Measurement]


def allocate_bits(run: Run) -> None:
    """Stage: give each layer its bits under the recipe's budget, as rules of the run's recipe."""
    quantize, folder = run.recipe.quantize, run.folder
    if quantize is None or quantize.allocate is None:
        return
    budget, layers = quantize.allocate, allocatable(run.model, quantize)
    by = "importance" if budget.sensitivity is None else "measured sensitivity"
    before = folder.metrics.get("allocated_bits")
    if before is not None:  # a resumed run keeps its bits
        bits = before["layers"]
    elif not layers:
        raise UserError("quantize.allocate: rules decide on all layers, none is left to allocate; remove a rule")
    else:
        with folder.stage("allocate bits", f"{budget.average_bits:g} on average, by {by}"):
            if budget.sensitivity is None:
                run.prepare_inference()
                clips = run.calibration.clip_samples()
                shown = tqdm(clips, "importance", len(run.calibration.clips), disable=run.silent)
                measured = importance(layers, lambda sample: run_sample(run.model, sample), shown)
                costs = {name: {b: value * 2.0**-b for b in budget.choices} for name, value in measured.items()}
            else:
                costs = measured_costs(budget.sensitivity, layers, budget.choices)
            bits, average_bits = allocate(layers, costs, budget.average_bits)
        counts = Counter(bits.values())
        summary = ", ".join(f"{counts[width]} at {width}" for width in sorted(counts))
        log.info("%.2f bits on average: %s bits", average_bits, summary)
        folder.record("allocated_bits", {"by": by, "average": average_bits, "layers": bits})
    rules = [Rule(match=name, weight_bits=bits[name], reason=f"allocated by {by}") for name in bits]
    quantize = quantize.model_copy(update={"rules": (*quantize.rules, *rules), "allocate": None})
    run.recipe = run.recipe.model_copy(update={"quantize": quantize})


def group_of(layer: str) -> str:
    """Group of a layer of SAM 2."""
    match = GROUP.match(layer)
    assert match is not None
    return match.group()


def allocatable(model: nn.Module, quantize: QuantizeRecipe) -> dict[str, nn.Module]:
    """Layers of a float model on which no rule of the recipe decides."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in QUANT_LAYERS}
    return {name: layer for name, layer in layers.items() if quantize.rule_for(name) is None}


def solve(costs: Costs, sizes: Mapping[str, int], average_bits: float) -> dict[str, int]:
    """Bits of least total cost in the budget: exact solution of a mixed-integer program (HiGHS through SciPy).

    `costs` are those of each layer at each allowed number of bits, `sizes` the numbers of weights.
    """
    chosen = [(name, bits) for name, by_bits in costs.items() for bits in by_bits]
    cost = np.array([costs[name][bits] for name, bits in chosen])
    used = np.array([sizes[name] * bits for name, bits in chosen], dtype=float)
    one_each = np.array([[name == other for other, _ in chosen] for name in costs], dtype=float)
    total = sum(sizes[name] for name in costs)
    scale = cost.max() or 1.0  # the solver's tolerances are absolute
    result = milp(
        cost / scale,
        integrality=np.ones(len(chosen)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(used[None] / total, -np.inf, average_bits + 1e-9),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message  # the fewest bits fit any budget that the recipe accepts
    return {name: bits for (name, bits), taken in zip(chosen, result.x, strict=True) if taken > 0.5}


def allocate(layers: Mapping[str, nn.Module], costs: Costs, average_bits: float) -> tuple[dict[str, int], float]:
    """Bits of least cost in the budget, and their mean over all weights.

    Costs are per layer, or per group, whose layers share bits.
    """
    key = {name: name if name in costs else group_of(name) for name in layers}
    count = {name: layer.get_parameter("weight").numel() for name, layer in layers.items()}
    sizes: Counter[str] = Counter()
    for name in layers:
        sizes[key[name]] += count[name]
    solution = solve({name: cost for name, cost in costs.items() if name in sizes}, sizes, average_bits)
    bits = {name: solution[key[name]] for name in layers}
    return bits, sum(bits[name] * count[name] for name in layers) / sum(count.values())


@torch.no_grad()
def importance(
    layers: Mapping[str, nn.Module], run: Callable[[Sample], object], samples: Iterable[Sample]
) -> dict[str, float]:
    """S_l = mean_ij |W_ij| |X_j|_2 per layer, j its inputs or channels (Mix-QSAM2); raises as `watch_inputs`."""
    energy: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        x = x.float()
        channel = x.ndim - 1 if isinstance(layers[name], nn.Linear) else x.ndim - 3
        squares = x.square().sum(dim=[dim for dim in range(x.ndim) if dim != channel], dtype=torch.float64)
        energy[name] = energy.get(name, torch.zeros_like(squares)) + squares

    with watch_inputs(layers, record, remedy="give more clips, or bits for these layers by a rule"):
        for sample in samples:
            run(sample)
    return {name: float((_mean_by_input(layer) * energy[name].sqrt()).mean()) for name, layer in layers.items()}


def measured_costs(file: Path, layers: Iterable[str], choices: Sequence[int]) -> Costs:
    """Costs of the groups of these layers from a file of `qsam2 sensitivity`, for each number of bits.

    The logarithm of the loss is interpolated linearly between measured bits; beyond them the noise power falls by 4 per
    bit. Costs never increase with the bits.

    Raises:
        UserError: the file is missing or not a sensitivity measurement, or a group was not measured.
    """
    try:
        rows = read_json(file, Sensitivity, what=SENSITIVITY, advice=MEASURE)["groups"]
    except UserError as error:
        raise UserError(f"quantize.allocate.sensitivity: {error}") from error
    measured: Costs = {}
    for row in rows:
        if row["part"] == "weights":
            measured.setdefault(row["group"], {})[row["bits"]] = max(row["loss"], 0.0)
    groups = dict.fromkeys(group_of(name) for name in layers)
    if lacking := [group for group in groups if group not in measured]:
        raise UserError(f"quantize.allocate.sensitivity: {file} lacks {lacking[0]}: {MEASURE}")
    return {group: _filled(measured[group], choices) for group in groups}


def _filled(measured: Mapping[int, float], choices: Sequence[int]) -> dict[int, float]:
    known = sorted(measured)
    floor = 1e-6
    filled = {}
    for bits in sorted(choices):
        nearest = min(max(bits, known[0]), known[-1])
        log_loss = np.interp(nearest, known, [math.log(max(measured[k], floor)) for k in known])
        filled[bits] = math.exp(log_loss) * 4.0 ** (nearest - bits)
    falling = np.maximum.accumulate(list(filled.values())[::-1])[::-1]
    return dict(zip(filled, falling.tolist(), strict=True))


def _mean_by_input(layer: nn.Module) -> Tensor:
    """Mean of |W| over the weights that one input channel or feature is multiplied by, (inputs,)."""
    weight = layer.get_parameter("weight").detach().double().abs()
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1).mean(dim=1)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1  # an output reads the inputs of its group
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).mean(dim=(1, 3)).flatten()
