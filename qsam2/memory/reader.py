"""Puts a recipe's memory into a model: how remembered frames are read, and whether the state is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qsam2.errors import UserError
from qsam2.memory.attention import MemoryReading
from qsam2.memory.bank import Bank, gather
from qsam2.memory.bounded import BoundedState
from qsam2.memory.sharing import KeySet, key_sets
from qsam2.recipe.memory import MemoryRecipe

if TYPE_CHECKING:
    from qsam2.models import SAM2


def use_memory(model: SAM2, recipe: MemoryRecipe) -> None:
    """Let a model, float or quantized, training or tracking, keep and read its memory as the recipe says.

    Raises:
        UserError: the recipe reads memory in another way, but the model has none.
    """
    if model.num_maskmem == 0 and recipe != MemoryRecipe():
        raise UserError("memory.*: this model has a memory of length 0 (num_maskmem=0): leave these keys out")
    model.memory_reader = MemoryReader(recipe) if recipe.reads_anew else None
    model.memory_bound = BoundedState() if recipe.bounded else None


class MemoryReader:
    """Replaces sam2's reading of the memory bank.

    `watch`, where set, is told of each frame an object is tracked on: its number, the bank, what is read of it.
    """

    def __init__(self, recipe: MemoryRecipe) -> None:
        self.recipe = recipe
        self.watch: Callable[[int, Bank, list[KeySet]], None] | None = None
        self.reading = MemoryReading(cache=recipe.cache)

    def condition(
        self,
        model: SAM2,
        features: Tensor,
        positions: Tensor,
        output_dict: dict[str, Any],
        *,
        frame_idx: int,
        num_frames: int,
        reverse: bool,
    ) -> Tensor:
        """A frame's features and positions (tokens, B, C) to features that know the memory, (tokens, B, C)."""
        bank = gather(
            model, output_dict, frame_idx=frame_idx, num_frames=num_frames, reverse=reverse, device=features.device
        )
        sets = key_sets(bank, self.recipe)
        if self.watch is not None:
            self.watch(frame_idx, bank, sets)
        return self.reading(model.memory_attention, features, positions, sets, bank, model.maskmem_tpos_enc)
