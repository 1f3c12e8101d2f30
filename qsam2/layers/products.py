"""Every product of SAM 2's forward pass: the bits of its operands, and how many levels they have where they are read.

The table follows from the conversion: a layer multiplies its input with its weight, an attention queries with keys and
probabilities with values; softmax gives the probabilities in float. `watch_products` observes a forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qsam2.errors import UserError
from qsam2.models import SAM2
from qsam2.models.replaced import hide_progress_bar
from qsam2.output import aligned
from qsam2.recipe.quantize import OWN_BITS, ConvertedLayer
from qsam2.recipe.recipe import MemoryRecipe

Record = Callable[[nn.Module | None, str, tuple[Tensor, ...]], None]
INPUT, SCORES, VALUES = "x W", "q k", "softmax v"
MULTIPLIES = {
    **dict.fromkeys(("linear", "conv2d", "conv_transpose2d"), (INPUT,)),
    "scaled_dot_product_attention": (SCORES, VALUES),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"), (SCORES,)),
}
"""Names of torch's functions that multiply matrices, and which products they are in a layer or an attention."""
FLOAT_PRODUCTS = {
    "sam_prompt_encoder.pe_layer": ("coordinates G", "random-Fourier encoding of positions"),
    "sam_mask_decoder": ("hyper_in upscaled", "masks, from the outputs of two parts of the decoder"),
}
"""Products outside of layers and attentions, by module."""
SAMPLE = 2**14
"""Values of an operand whose levels are counted: an evenly strided part of a larger one."""
FRAMES = 3
"""Frames of `track_noise`: prompted by a mask, prompted by a click, tracked."""


class NotFiniteError(UserError):
    """A product is NaN or infinite."""


class Product(NamedTuple):
    """A row of the table: `bits` of the left and the right operand, None for float."""

    name: str
    kind: str
    what: str
    bits: tuple[int | None, int | None]
    reason: str


def products(rows: Sequence[ConvertedLayer], memory: MemoryRecipe) -> list[Product]:
    """All products of a converted model, in its order, with its memory read as the recipe says."""
    table = []
    for row in rows:
        if "Attention" not in row.kind:
            table.append(Product(row.name, row.kind, INPUT, (row.activation_bits, row.weight_bits), row.reason))
            continue
        mixed = memory.mixes if fnmatchcase(row.name, "memory_attention.*.cross_attn_image") else {}
        for what, operands in ((SCORES, "qk"), (VALUES, "pv")):
            bits = tuple(None if part in mixed or part == "p" else row.activation_bits for part in operands)
            reason = next((mixed[part] for part in operands if part in mixed), row.reason)
            table.append(Product(row.name, row.kind, what, (bits[0], bits[1]), reason))
    for name, (what, reason) in FLOAT_PRODUCTS.items():
        if any(row.name.startswith(name.split(".")[0]) for row in rows):
            table.append(Product(name, "", what, (None, None), reason))
    return table


def product_table(table: Sequence[Product]) -> str:
    """Rows as text: layer, kind, product, bits of its operands, reason."""
    cells: list[Sequence[str]] = [("layer", "kind", "product", "bits", "reason")]
    for row in table:
        left, right = ("float" if bits is None else str(bits) for bits in row.bits)
        cells.append((row.name, row.kind or "-", row.what, f"{left} x {right}", row.reason))
    return aligned(cells)


def exceptions_table(table: Sequence[Product]) -> str:
    """Number of products with the recipe's bits, and the rows of the others, as text."""
    others = [row for row in table if row.reason != OWN_BITS]
    summary = f"{len(table) - len(others)} of {len(table)} products have the recipe's bits (probabilities are in float)"
    return f"{summary}; the others:\n{product_table(others)}" if others else summary


class Watch(TorchFunctionMode):
    """Mode of torch in which `record(module, product, operands)` is called after each product: see `watch_products`."""

    def __init__(self, record: Record, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.record, self.names = record, names
        self.modules: list[nn.Module] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in MULTIPLIES:
            operands = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            module = self.modules[-1] if self.modules else None
            if not result.isfinite().all():
                place = self.names.get(module, "") if module is not None else ""
                raise NotFiniteError(f"{place or 'a product'} computes NaN or infinity")
            if len(MULTIPLIES[name]) == 2:
                self.record(module, SCORES, operands[:2])
                self.record(module, VALUES, operands[2:3])
            else:
                self.record(module, MULTIPLIES[name][0], operands[:2])
        return result


_watches: list[Watch] = []


def is_watched() -> bool:
    """True within `watch_products`."""
    return bool(_watches)


@contextlib.contextmanager
def products_of(module: nn.Module) -> Iterator[None]:
    """Context manager: products belong to a module although that is not called itself."""
    for watch in _watches:
        watch.modules.append(module)
    try:
        yield
    finally:
        for watch in _watches:
            watch.modules.pop()


@contextlib.contextmanager
def watch_products(model: nn.Module, record: Record) -> Iterator[None]:
    """Context manager: `record(module, product, operands)` for each product in a forward of the model.

    The operands are those that are at hand: q and k, v without the probabilities, x and W.

    Raises:
        NotFiniteError: a product is NaN or infinite.
    """
    watch = Watch(record, {module: name for name, module in model.named_modules()})
    handles: list[Any] = []
    for module in watch.names:
        handles.append(module.register_forward_pre_hook(lambda module, _: watch.modules.append(module)))
        handles.append(module.register_forward_hook(lambda *_: watch.modules.pop() and None, always_call=True))
    _watches.append(watch)
    try:
        with watch:
            yield
    finally:
        _watches.remove(watch)
        for handle in handles:
            handle.remove()


def levels(x: Tensor) -> int:
    """Number of distinct values other than zero, in a sample of a tensor (zeros also pad)."""
    sample = x.detach().flatten()
    values = sample[:: sample.numel() // SAMPLE | 1].unique()  # odd, so that it meets all channels
    return int((values != 0).sum())


def track_noise(model: SAM2) -> list[Tensor]:
    """Masks and object pointers of a clip of noise, prompted by a mask, a box and a click: every part computes."""
    side = model.image_size
    count = FRAMES if model.memory_reader is None else model.num_maskmem + FRAMES
    frames = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    with hide_progress_bar():
        state = model.init_state(list(frames), video_size=(side, side))
        model.add_new_mask(state, 0, 1, mask)
        model.add_new_points_or_box(state, 1, 1, points=[[side / 3, side / 3]], labels=[1], box=[0, 0, side / 2, side])
        masks = [masks for _, _, masks in model.propagate_in_video(state)]
    outputs = state["output_dict_per_obj"][0]
    return masks + [frame["obj_ptr"] for kind in outputs.values() if isinstance(kind, dict) for frame in kind.values()]
