"""How the frames that a tracked object left behind are kept and read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from qsam2.recipe.section import Section

Sharing = Literal["none", "adaptive", "oldest", "stride", "pool", "sparse", "synthesis"]


class MemoryRecipe(Section):
    """The memory bank; the defaults are sam2's own.

    Conditioning frames (those that were prompted) and object pointers are always read as they are.
    """

    cache: bool = False
    """Whether keys and values of a remembered frame are computed once; false: anew for each frame, as sam2 does."""
    sharing: Sharing = "none"
    """How remembered frames are read by fewer keys, see `qsam2.memory.sharing`."""
    frames: PositiveInt | None = None
    """Key budget of sharing in frames, conditioning frames included: of the others at least one is left from 2 up."""
    quantile: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of adaptive sharing: neighbours share keys from this quantile of the video's similarities on, in the budget too.
    """
    bounded: bool = False
    """Whether the state keeps only what later frames can still ask for; the masks are the same."""

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
        """Whether memory is read in another way than sam2's."""
        return self.cache or self.sharing != "none"
