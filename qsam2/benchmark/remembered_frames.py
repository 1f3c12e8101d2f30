"""Cost of tracking with a full memory bank: stock `sam2`, the cache, sharing at several budgets, bounded state."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsam2.benchmark.measure import WARM_UPS, Tracking, check_positive, held_bytes, machine, medians, random_sam2
from qsam2.errors import UserError
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.models.replaced import hide_progress_bar
from qsam2.recipe.recipe import MemoryRecipe, Sharing

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}
BUDGETS: dict[Sharing, tuple[int, ...]] = {
    "adaptive": (2, 3, 4),
    "oldest": (3,),
    "stride": (3,),
    "pool": (3,),
    "sparse": (3,),
    "synthesis": (3,),
}
"""Ways of sharing, with the numbers of frames that they are measured at."""

SETTINGS: dict[str, MemoryRecipe] = {
    "sam2": MemoryRecipe(),
    "bounded": MemoryRecipe(bounded=True),
    "cache": MemoryRecipe(cache=True, bounded=True),
    **{
        f"{sharing} {frames}": MemoryRecipe(cache=True, sharing=sharing, frames=frames, bounded=True)
        for sharing, budgets in BUDGETS.items()
        for frames in budgets
    },
}
"""Memory settings that are measured, by name; "sam2" is sam2 as it is."""


def benchmark_memory(
    *, size: str, image_size: int | None, objects: int, frames: int, repeats: int, precision: str, device: str
) -> dict[str, dict[str, float]]:
    """Tracks noise with random weights in all settings in turn, a frame each, behind `frames` frames.

    Returns {SETTING: {"seconds_per_frame", "attention_seconds", "keys", "state_bytes", "attention_macs"}}, seconds as
    medians over `repeats` frames. Seconds and multiply-adds are of a frame with all its objects: of the memory
    attention, and there of scores and weighted sums. Keys are those of a layer and object; bytes are those of all
    tensors that the state holds after the last frame, the frames that are still there included.

    Raises:
        UserError: a number that is not positive, a precision, device, size or image size that is none.
    """
    check_positive(objects=objects, frames=frames, repeats=repeats)
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: choose cpu, or cuda where PyTorch finds a GPU")
    model = random_sam2(size, image_size).to(device)
    with hide_progress_bar():
        runs = {
            name: _Tracking(model, memory, objects, frames, WARM_UPS + repeats, PRECISIONS[precision])
            for name, memory in SETTINGS.items()
        }
        seconds = medians(runs, repeats, progress="memory")
    return {
        name: {
            "seconds_per_frame": seconds[name][0],
            "attention_seconds": seconds[name][1],
            "keys": run.keys,
            "state_bytes": state_bytes(run.state),
            "attention_macs": objects * attention_macs(model, run.keys, run.value_channels),
        }
        for name, run in runs.items()
    }


class _Tracking(Tracking):
    """One setting behind a full bank."""

    parts = ("attention",)

    def __init__(
        self, model: SAM2, memory: MemoryRecipe, objects: int, frames: int, more: int, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.dtype = copy.copy(model), dtype  # the same weights
        self.keys, self.value_channels = 0, model.hidden_dim
        use_memory(self.model, memory)
        read = self.timed("attention", self.model._prepare_memory_conditioned_features)
        object.__setattr__(self.model, "_prepare_memory_conditioned_features", read)
        side = model.image_size
        length = 1 + frames + more
        # sam2 decodes a whole video before it starts; a bounded state is given a stream
        video = _noise(side, length) if memory.bounded else torch.stack(list(_noise(side, length)))
        self.state = self.model.init_state(video, video_size=(side, side))
        for index in range(objects):
            mask = torch.zeros(side, side, dtype=torch.bool)
            mask[side // 4 : side // 2, side // 8 * index : side // 8 * index + side // 2] = True
            with self._precision():
                self.model.add_new_mask(self.state, 0, index, mask)
        self.frames = self.model.propagate_in_video(self.state)
        for _ in range(1 + frames):
            self()

    def step(self) -> None:
        def note(_: nn.Module, __: object, named: Mapping[str, Any]) -> None:
            self.keys = len(named["memory"])

        hook = self.model.memory_attention.register_forward_pre_hook(note, with_kwargs=True)
        with self._precision():
            next(self.frames)
        hook.remove()  # the settings share this module
        if self.model.memory_reader is not None:
            reader: Any = self.model.memory_reader
            self.keys, self.value_channels = reader.keys, reader.value_channels

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype is not None)


def _noise(side: int, length: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, side, side, generator=generator) for _ in range(length))


def attention_macs(model: SAM2, keys: int, value_channels: int) -> int:
    """Multiply-adds of scores and weighted sums in the memory attention of one frame and object."""
    tokens = (model.image_size // model.backbone_stride) ** 2
    itself, memory = 2 * model.hidden_dim * tokens, (model.hidden_dim + value_channels) * keys
    return len(model.memory_attention.layers) * tokens * (itself + memory)


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of all tensors that a tracking state holds, what it was given by the user included."""
    return held_bytes(_tensors(state, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith("qsam2.") and id(value) not in seen:
        seen.add(id(value))
        yield from _tensors(vars(value), seen)


def markdown_table(result: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of `benchmark_memory` as text, a row a setting, times also relative to sam2."""
    about, stock = machine(), result["sam2"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}",
        "",
        "| setting | frame s | times faster | memory attention s | times faster | keys | attention GMACs | state MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        cells = [name]
        for key in ("seconds_per_frame", "attention_seconds"):
            cells += [f"{row[key]:.3f}", f"{stock[key] / row[key]:.2f}"]
        cells += [str(row["keys"]), f"{row['attention_macs'] / 1e9:.1f}", f"{row['state_bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
