"""Small models and videos, and tracking them with everything that a user can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sam2 import sam2_video_predictor
from torch import Tensor

from qsam2.memory.reader import use_memory
from qsam2.models import SAM2, build_sam2
from qsam2.recipe.recipe import MemoryRecipe

SIZE_PX = 64
sam2_video_predictor.tqdm = lambda frames, **_: frames  # no bars between the dots of pytest

Masks = dict[tuple[str, int], Tensor]


def random_nano() -> SAM2:
    """nano with random weights."""
    torch.manual_seed(0)
    return lively(build_sam2("nano", image_size=SIZE_PX))


def lively(model: SAM2, gain: float = 4) -> SAM2:
    """Which keys there are shows in the masks: they see objects, and attention is peaked."""
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[2].bias, 4.0)
    torch.nn.init.normal_(model.maskmem_tpos_enc, std=0.3)
    for layer in model.memory_attention.layers:
        layer.cross_attn_image.q_proj.weight.data *= gain
        layer.cross_attn_image.out_proj.weight.data *= gain
    for head in model.sam_mask_decoder.output_hypernetworks_mlps:
        head.layers[2].weight.data *= 3
    return model


def video(length: int, size: int = SIZE_PX) -> list[Tensor]:
    """Noise that drifts slowly: neighbouring frames are alike."""
    generator = torch.Generator().manual_seed(1)
    first, last = torch.randn(2, 3, size, size, generator=generator)
    return [first + (last - first) * index / length for index in range(length)]


def box(left: int, size: int = SIZE_PX) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[size // 4 : 3 * size // 4, left : left + size // 3] = True
    return mask


def track(model: Any, length: int, *, size: int = SIZE_PX, state: dict[str, Any] | None = None) -> Masks:
    """Two objects from a third of the video on to five sixths, prompted again there, to its end, and then back."""
    start, stop = length // 3, length * 5 // 6
    if state is None:
        state = model.init_state(video(length, size), video_size=(size, size))
    model.add_new_mask(state, start, 1, box(4, size))
    model.add_new_mask(state, start, 2, box(size // 2, size))
    masks: Masks = {}
    masks |= {("first", i): m for i, _, m in model.propagate_in_video(state, max_frame_num_to_track=stop - start)}
    model.add_new_points_or_box(state, stop, 1, points=[[10.0, 12.0]], labels=[1])  # a correction
    model.add_new_points_or_box(state, stop + 1, 2, points=[[30.0, 20.0]], labels=[1])  # a new prompted frame
    masks |= {("later", i): m for i, _, m in model.propagate_in_video(state, start_frame_idx=stop)}
    masks |= {("back", i): m for i, _, m in model.propagate_in_video(state, reverse=True)}
    return masks


def start(model: SAM2, images: Any, **memory: Any) -> dict[str, Any]:
    """A state in which an object is prompted on the first frame, with memory as these keys of a recipe say."""
    use_memory(model, MemoryRecipe(**memory))
    state = model.init_state(images, video_size=(SIZE_PX, SIZE_PX))
    model.add_new_mask(state, 0, 1, box(4))
    return state


def follow(model: SAM2, state: dict[str, Any], name: str = "", **where: Any) -> Masks:
    """Mask logits of the frames that a state is propagated to."""
    return {(name, index): masks for index, _, masks in model.propagate_in_video(state, **where)}


def track_with(model: SAM2, length: int, **memory: Any) -> Masks:
    """`track` with memory as these keys of a recipe say."""
    use_memory(model, MemoryRecipe(**memory))
    return track(model, length)


def distance(masks: Masks, others: Masks) -> float:
    """The largest difference of mask logits."""
    assert masks.keys() == others.keys()
    return max(float((mask - others[key]).abs().max()) for key, mask in masks.items())


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield
