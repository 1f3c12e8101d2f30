"""The table of products: it lists all that a forward multiplies, and says float where operands are not on a grid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_sam2 import segment_image, track_video
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers import audit as audits
from qsam2.layers.audit import AuditError, audit
from qsam2.layers.convert import convert, finalize
from qsam2.layers.products import NotFiniteError, levels, product_table, products, track_noise, watch_products
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe.quantize import ConvertedLayer, QuantizeRecipe
from qsam2.recipe.recipe import MemoryRecipe

RECIPE = QuantizeRecipe.model_validate(
    {
        "weights": {"method": "minmax", "bits": 4},
        "activations": {"method": "minmax", "bits": 4},
        "rules": [{"match": "memory_attention.*.self_attn", "keep_float": True, "reason": "a test"}],
    }
)
CROSS = "memory_attention.layers.0.cross_attn_image"
Converted = tuple[SAM2, list[ConvertedLayer]]


@pytest.fixture(scope="module")
def quantized(pristine: SAM2) -> Converted:
    model = copy.deepcopy(pristine)
    rows = convert(model, RECIPE)
    find_ranges(model, lambda _: track_video(model), [0])
    finalize(model)
    return model, rows


@pytest.fixture
def converted(quantized: Converted) -> Converted:
    return copy.deepcopy(quantized)


class Counted(TorchDispatchMode):
    """Counts ATen's products: what torch computes, however it was called."""

    NAMES = (
        *("linear", "conv2d", "conv_transpose2d", "scaled_dot_product_attention", "matmul", "convolution", "einsum"),
        *("mm", "addmm", "bmm", "baddbmm", "mv", "dot"),
    )
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.count += name in self.NAMES or name.startswith("_scaled_dot_product")  # the fused kernels
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", [{}, {"cache": True, "sharing": "adaptive", "frames": 3}], ids=["sam2", "shared"])
def test_every_product_that_torch_computes_is_in_the_table_and_all_rows_are_reached(
    converted: Converted, memory: dict[str, Any]
) -> None:
    model, rows = converted
    use_memory(model, MemoryRecipe(**memory))
    watched: list[str] = []
    operands = audits._Operands(model, rows)
    reached = set()

    def record(module: nn.Module | None, what: str, tensors: tuple[Tensor, ...]) -> None:
        operands.record(module, what, tensors)
        reached.add((operands.names.get(module, ""), what))
        if what != "softmax v":  # fused with q k
            watched.append(what)

    with Counted() as counted, watch_products(model, record):
        track_noise(model)
        segment_image(model)
    assert operands.problems == []
    assert counted.count == len(watched) > 200
    missed = {name for name, _ in set(operands.bits) - reached} - {"sam_prompt_encoder.pe_layer", "sam_mask_decoder"}
    assert missed <= {f"sam_prompt_encoder.mask_downscaling.{index}" for index in (0, 3, 6)}


SHARED = [
    ({}, ""),
    ({"cache": True}, "k"),
    ({"cache": True, "sharing": "oldest", "frames": 3}, "k"),
    ({"cache": True, "sharing": "adaptive", "frames": 3}, "kv"),
    ({"cache": True, "sharing": "synthesis", "frames": 3}, "kv"),
    ({"sharing": "adaptive", "frames": 3}, ""),
    ({"sharing": "synthesis", "frames": 3}, ""),
    ({"sharing": "sparse", "frames": 3}, ""),
    ({"sharing": "pool", "frames": 3}, "kv"),
]


@pytest.mark.parametrize(("memory", "mixed"), SHARED, ids=str)
def test_keys_and_values_are_counted_where_they_are_read(
    converted: Converted, memory: dict[str, Any], mixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that says float passes; one that says 4 bits does, too, only if there are no more than 16 levels."""
    model, rows = converted
    recipe = MemoryRecipe(**memory)
    use_memory(model, recipe)
    audit(model, rows, RECIPE, lambda: track_noise(model))
    table = {row.what: row.bits for row in products(rows, recipe) if row.name == CROSS}
    others = [[row for row in products(rows, of) if row.name != CROSS] for of in (recipe, MemoryRecipe())]
    assert others[0] == others[1], "memory is read nowhere else"
    keys, values = ("k" in mixed), ("v" in mixed)
    assert table == {"q k": (4, None if keys else 4), "softmax v": (None, None if values else 4)}
    if mixed:
        monkeypatch.setattr(MemoryRecipe, "mixes", {})
        with pytest.raises(AuditError) as error:
            audit(model, rows, RECIPE, lambda: track_noise(model))
        found = [line.split(": ")[1].split()[0] for line in str(error.value).splitlines()[1:]]
        assert found == list(mixed) and "levels where it is read, 4 bits allow 16" in str(error.value)


def test_the_text_of_the_table(converted: Converted) -> None:
    lines = product_table(products(converted[1], MemoryRecipe(cache=True))).splitlines()
    assert lines[0].split() == ["layer", "kind", "product", "bits", "reason"]
    assert [" ".join(line.split()) for line in lines if line.startswith(f"{CROSS} ")] == [
        f"{CROSS} RoPEAttention q k 4 x float memory.cache adds a quantized key and a quantized temporal position",
        f"{CROSS} RoPEAttention softmax v float x 4 the recipe's bits",
    ]
    assert [" ".join(line.split()) for line in lines[-2:]] == [
        "sam_prompt_encoder.pe_layer - coordinates G float x float random-Fourier encoding of positions",
        "sam_mask_decoder - hyper_in upscaled float x float masks, from the outputs of two parts of the decoder",
    ]
    assert products([], MemoryRecipe()) == []
    kept = next(line for line in lines if "layers.0.self_attn " in line and "q k" in line)
    assert "float x float" in kept and kept.endswith("a test")


@pytest.mark.parametrize("part", ["memory_encoder.out_proj", "sam_mask_decoder.iou_prediction_head.layers.0"])
def test_a_product_that_is_not_finite_is_named(converted: Converted, part: str) -> None:
    model, rows = converted
    with torch.no_grad():
        model.get_submodule(part).bias.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match=f"^{part} computes NaN or infinity$"):
        audit(model, rows, RECIPE, lambda: track_noise(model))


def test_operands_given_by_name_are_seen() -> None:
    seen: list[int] = []
    x = torch.ones(2, 4, 4)
    with watch_products(nn.Identity(), lambda module, what, operands: seen.append(len(operands))):
        nn.functional.linear(x, weight=x[0])
        nn.functional.scaled_dot_product_attention(x, key=x, value=x)
    assert seen == [2, 2, 1]


def test_levels_are_counted_without_zero_and_in_large_tensors_by_a_sample() -> None:
    assert levels(torch.tensor([0.0, -0.0, 1.0, 1.0, -2.0])) == 2
    assert levels(torch.arange(10**6) % 17) == 16
    assert levels(torch.arange(2**15) % 2 + 1) == 2  # twice the sample, of two channels
    assert levels(torch.empty(0)) == 0
