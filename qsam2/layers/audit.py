"""Audit before every evaluation and export: each layer computes with the bits that the conversion table states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

from qsam2.layers.attention import QuantizedAttention
from qsam2.layers.convert import QUANT_ATTENTIONS, QUANT_LAYERS, quantized_weights, quantizers
from qsam2.layers.hooks import nested_tensors
from qsam2.layers.products import INPUT, SCORES, VALUES, levels, products, watch_products
from qsam2.layers.weight import QuantizedLayer
from qsam2.quantizers import Quantizer, QuantizerState
from qsam2.recipe.quantize import ConvertedLayer, QuantizeRecipe
from qsam2.recipe.recipe import MemoryRecipe

FLOAT_MODULES = (nn.LayerNorm, LayerNorm2d, nn.Embedding)
"""Modules that always stay in float: normalisation, small embedding tables."""
FLOAT_PARAMETERS = (
    "image_encoder.trunk.pos_embed",
    "image_encoder.trunk.pos_embed_window",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_mem_embed",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    "memory_encoder.fuser.layers.*.gamma",
)
"""Other parameters that always stay in float: position embeddings, single tokens, one scale per channel."""


class AuditError(RuntimeError):
    """The model differs from its conversion table, which is a fault of the program. Names all violations."""


@torch.no_grad()
def audit(
    model: nn.Module,
    rows: Sequence[ConvertedLayer],
    quantize: QuantizeRecipe | None = None,
    forward: Callable[[], object] | None = None,
) -> str:
    """Check a finalized model against its conversion table; returns what was found, in one line.

    All quantizers are frozen and calibrated; every weight equals its own dequantized integers exactly, with at most
    2^bits levels per channel, and the layer computes with it; bits are those of the table; everything in float is kept
    there by a rule or by `FLOAT_MODULES` and `FLOAT_PARAMETERS`; every rule of `quantize` decides on some layer. Two
    calls of `forward`, which may return nested tensors, agree bit for bit; each of their products is in the table, and
    its operands have at most the levels of their bits where they are read.

    Raises:
        NotFiniteError: a product of `forward` is NaN or infinite.
        AuditError: any of these conditions is violated.
    """
    modules = dict(model.named_modules())
    problems = []
    for row in rows:
        table = row.weight_bits, row.activation_bits
        bits = _bits(modules[row.name]) if row.name in modules else None
        if bits != table:
            problems.append(f"{row.name}: the table says bits {table}, the model has {bits}")
    problems += _quantizer_violations(model)
    if not problems:  # integers of weights can be computed with valid quantizers only
        problems += _weight_violations(model)
    float_values, unexplained = _float_values(modules, rows)
    problems += unexplained
    if quantize is not None:
        deciding = {id(quantize.rule_for(row.name)) for row in rows}
        problems += [f"rule {rule.match!r} decides on no layer" for rule in quantize.rules if id(rule) not in deciding]
    if forward is not None and not problems:
        watched = _Operands(model, rows)
        with watch_products(model, watched.record):
            first, second = (list(nested_tensors(forward())) for _ in range(2))
        problems += watched.problems
        if len(first) != len(second) or not first:
            problems.append(f"forward gave {len(first)}, then {len(second)} tensors")
        elif not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
            problems.append("two forwards differ (or hold NaN)")
    if problems:
        raise AuditError("\n  ".join([f"audit found {len(problems)} violations:", *problems]))
    on_grids = sum(layer.weight.numel() for _, layer, _ in quantized_weights(model))
    return (
        f"audit passed: {len(list(quantizers(model)))} quantizers frozen, {on_grids:,} weights on their grids, "
        f"{float_values:,} values in float"
    )


class _Operands:
    """Compares the operands of a forward's products with the table; names each violation once."""

    def __init__(self, model: nn.Module, rows: Sequence[ConvertedLayer]) -> None:
        reader = getattr(model, "memory_reader", None)
        table = products(rows, MemoryRecipe() if reader is None else reader.recipe)
        self.names = {module: name for name, module in model.named_modules()}
        self.bits = {(row.name, row.what): row.bits for row in table}
        self.float_modules = tuple(row.name for row in table if row.what not in (INPUT, SCORES, VALUES))
        self._found: dict[tuple[str, str], str] = {}

    @property
    def problems(self) -> list[str]:
        return list(self._found.values())

    def record(self, module: nn.Module | None, what: str, operands: tuple[Tensor, ...]) -> None:
        """A product that was computed; the first one wrong of its kind and place is kept."""
        name = "" if module is None else self.names.get(module, "")
        bits = self.bits.get((name, what))
        if bits is None:
            # the prompt encoder also calls a method of its layer
            listed = name and any(f"{row}.".startswith(f"{name}.") for row in self.float_modules)
            if what != SCORES or not listed:
                self._found.setdefault((name, what), f"{name or 'the model'}: its product {what} is in no table")
            return
        if what == INPUT and isinstance(module, QuantizedLayer) and not torch.equal(operands[1], module.weight):
            self._found.setdefault((name, "W"), f"{name}: computes with another weight than its own")
        counted = {SCORES: zip("qk", operands, bits, strict=True), VALUES: [("v", operands[0], bits[1])]}
        for operand, tensor, width in counted.get(what, [("its input", operands[0], bits[0])]):
            if width is not None and (count := levels(tensor)) > 2**width:
                problem = f"{name}: {operand} has {count} levels where it is read, {width} bits allow {2**width}"
                self._found.setdefault((name, operand), problem)


def _bits(layer: nn.Module) -> tuple[int | None, int | None]:
    """Bits of weights and activations; -1 if q, k and v differ or another module is in a quantizer's place."""

    def bits_of(quantizer: nn.Module | None) -> int | None:
        if quantizer is None:
            return None
        return quantizer.bits if isinstance(quantizer, Quantizer) else -1

    if isinstance(layer, QuantizedLayer):
        return bits_of(layer.weight_quantizer), bits_of(layer.input_quantizer)
    if isinstance(layer, QuantizedAttention):
        bits = {bits_of(quantizer) for quantizer in (layer.q_quantizer, layer.k_quantizer, layer.v_quantizer)}
        return None, bits.pop() if len(bits) == 1 else -1
    return None, None


def _quantizer_violations(model: nn.Module) -> Iterator[str]:
    for name, quantizer in quantizers(model):
        if quantizer.state is not QuantizerState.FROZEN:
            yield f"{name}: is {quantizer.state.name}, not FROZEN"
        elif not quantizer.calibrated:
            yield f"{name}: was never calibrated"
        elif not (quantizer.scale.isfinite().all() and (quantizer.scale > 0).all()):
            yield f"{name}: has a scale that is not positive and finite"


def _weight_violations(model: nn.Module) -> Iterator[str]:
    for name, layer, quantizer in quantized_weights(model):
        weight = layer.weight
        if not torch.equal(weight, quantizer.dequantize(quantizer.to_int(weight), weight.dtype)):
            yield f"{name}.weight: is not its own dequantized integers"
        if (levels := _most_levels(weight, layer.channel_dim)) > 2**quantizer.bits:
            yield f"{name}.weight: has {levels} levels in a channel, {quantizer.bits} bits allow {2**quantizer.bits}"
        if not torch.equal(layer.quantized_weight().to(weight.dtype), weight):
            yield f"{name}: computes with another weight than its own"


def _most_levels(weight: Tensor, channel_dim: int) -> int:
    """Largest number of distinct values in a channel."""
    ordered = weight.transpose(0, channel_dim).flatten(1).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1


def _float_values(modules: Mapping[str, nn.Module], rows: Sequence[ConvertedLayer]) -> tuple[int, list[str]]:
    """Number of values in float (without biases of quantized layers), and violations: parameters without a reason."""
    kept = {row.name for row in rows if row.weight_bits is None}
    quantized = {row.name for row in rows} - kept
    values, problems = 0, []
    for name, module in modules.items():
        if isinstance(module, Quantizer) or name in quantized:
            continue
        if isinstance(module, (*QUANT_LAYERS, *QUANT_ATTENTIONS)) and name not in kept:
            problems.append(f"{name}: {type(module).__name__} is not in the conversion table")
            continue
        has_reason = name in kept or type(module) in FLOAT_MODULES
        for key, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{key}".lstrip(".")
            if has_reason or any(fnmatchcase(path, pattern) for pattern in FLOAT_PARAMETERS):
                values += parameter.numel()
            else:
                problems.append(f"{path}: is in float and no rule keeps it")
    return values, problems
