"""The memory bank: how remembered frames are kept and read while tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from qsam2.recipe.section import Section

Sharing = Literal["none", "adaptive", "oldest", "stride", "pool", "sparse", "synthesis"]


class MemoryRecipe(Section):
    """Memory bank while tracking. Defaults: as sam2 does.

    Conditioning frames (those with prompts) and object pointers are always read in full.
    """

    cache: bool = False
    """Compute keys and values of a remembered frame once. false: again for every frame that reads them."""
    sharing: Sharing = "none"
    """Reading remembered frames by fewer keys: adaptive merges similar neighbours (Q-MiniSAM2); oldest, stride, pool,
    sparse and synthesis are baselines (docs/memory.md)."""
    frames: PositiveInt | None = None
    """Key budget of sharing, in frames, conditioning frames included. From 2 up at least one other frame is read."""
    quantile: Annotated[float, Field(ge=0, le=1)] | None = None
    """Adaptive sharing alone: quantile of the video's similarities above which neighbours share keys. null: only as
    many share as the budget requires."""
    bounded: bool = False
    """Keep only what later frames can still read, so that the state does not grow; the masks are the same."""

    @model_validator(mode="after")
    def _sharing_has_a_budget(self) -> MemoryRecipe:
        if self.quantile is not None and self.sharing != "adaptive":
            raise ValueError(f"quantile={self.quantile} is for sharing=adaptive, not {self.sharing}: give null")
        if self.sharing == "none" and self.frames is not None:
            raise ValueError(
                f"frames={self.frames} is a budget of sharing, which is none: give sharing=adaptive, or null"
            )
        if self.sharing != "none" and self.frames is None and self.quantile is None:
            also = " or quantile=Q" if self.sharing == "adaptive" else ""
            raise ValueError(f"sharing={self.sharing} needs a key budget in frames: give frames=N{also}")
        return self

    @property
    def reads_anew(self) -> bool:
        """True if memory is read in another way than sam2's."""
        return self.cache or self.sharing != "none"
