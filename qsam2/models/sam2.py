"""SAM 2 in all sizes, built from `sam2`'s own configurations, and nano: the same architecture for a laptop.

`SAM2` adds to `sam2`'s video predictor: training, frames read on access (also from a stream), and hooks through which
`qsam2.memory` reads and bounds the memory bank.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.models.frames import CheckedFrames, EndOfStream, FrameStream, checked_number
from qsam2.recipe.recipe import MemoryRecipe

# SAM2Train needs this module for an annotation alone, whose import (tensordict) takes a second of every inference.
_placeholder = ModuleType("training.utils.data_utils")
vars(_placeholder)["BatchedVideoDatapoint"] = object
_is_used = sys.modules.setdefault(_placeholder.__name__, _placeholder) is _placeholder
from training.model.sam2 import SAM2Train  # noqa: E402

if _is_used:
    del sys.modules[_placeholder.__name__]

STRIDE_PX = 32
"""Image sizes are multiples of this: Hiera's coarsest stride, eight tokens of its finest."""
MAX_SIZE_PX = 4096
"""Limit for sizes read from untrusted files: position tables grow with the square of the image size."""


@dataclass(frozen=True)
class Size:
    """One size of SAM 2: configuration in the `sam2` package, number of weights, native resolution in pixels."""

    config: str
    parameters: int
    image_size: int = 1024


SIZES = {
    "nano": Size("t", 4_252_290, image_size=320),
    "nano_heavy": Size("t", 4_252_290, image_size=320),
    "nano_tails": Size("t", 4_252_290, image_size=320),
    "tiny": Size("t", 38_962_754),
    "small": Size("s", 46_060_610),
    "base_plus": Size("b+", 80_850_434),
    "large": Size("l", 224_446_898),
}
VERSIONS = ("2", "2.1")
EMBEDDED = ("nano", "nano_heavy", "nano_tails")
"""Sizes whose weights ship in the package; all have the shape `NANO` (see `heavy.py`, `tails.py`)."""

NANO = {
    "image_encoder": {
        "trunk": {
            "embed_dim": 32,
            "stages": [1, 2, 4, 2],
            "global_att_blocks": [],
            "window_pos_embed_bkg_spatial_size": [8, 8],
        },
        "neck": {
            "d_model": 128,
            "backbone_channel_list": [256, 128, 64, 32],
            "position_encoding": {"num_pos_feats": 128},
        },
    },
    "memory_attention": {
        "d_model": 128,
        "num_layers": 2,
        "layer": {
            "d_model": 128,
            "dim_feedforward": 256,
            "self_attention": {"embedding_dim": 128},
            "cross_attention": {"embedding_dim": 128, "kv_in_dim": 64},
        },
    },
    "memory_encoder": {
        "in_dim": 128,
        "out_dim": 64,
        "position_encoding": {"num_pos_feats": 64},
        "mask_downsampler": {"embed_dim": 128},
        "fuser": {"layer": {"dim": 128}},
    },
    "decoder_mlp_dim": 512,
    # one mask per frame while tracking, not the best of three: a small model predicts their IoU badly
    "multimask_output_for_tracking": False,
    "sam_mask_decoder_extra_args": {"dynamic_multimask_via_stability": False},
}
"""nano: changes to sam2.1_hiera_t, with fewer channels and blocks; `model_config` sets the windows."""


class MemoryReader(Protocol):
    """Replaces `sam2`'s reading of the memory bank; see `qsam2.memory.reader`."""

    recipe: MemoryRecipe

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
        """Condition a frame's features on the memory: features and positions (tokens, B, C) to (tokens, B, C)."""
        ...


class MemoryBound(Protocol):
    """Removes state that no later frame reads; see `qsam2.memory.bank`."""

    def forget(self, model: SAM2, state: dict[str, Any], frame_idx: int) -> None: ...
    def check_prompt(self, model: SAM2, state: dict[str, Any], frame_idx: int, obj_id: int, *, reads: bool) -> None: ...
    def check_start(self, model: SAM2, state: dict[str, Any], start: int, *, reverse: bool) -> None: ...


VideoReader: TypeAlias = Callable[[str | Path, int], tuple[Sequence[Tensor], tuple[int, int]]]
"""(path, image size) to normalized frames, read on access, and the video's (height, width)."""


class SAM2(SAM2VideoPredictor, SAM2Train):
    """One model that trains as Meta's `SAM2Train` and tracks as `sam2`'s `SAM2VideoPredictor`, with the same weights.

    State-dict keys are those of the official checkpoints. Off by default: `memory_reader` and `memory_bound`, set by
    `qsam2.memory.reader.use_memory`; `video_reader`, set by `qsam2.video_predictor`.
    """

    memory_reader: MemoryReader | None = None
    memory_bound: MemoryBound | None = None
    video_reader: VideoReader | None = None
    size: str | None = None
    """One of `SIZES`, as `qsam2.load` sets it."""
    tracked_frame: int = 0
    """Index of the frame that is being tracked, or was last."""

    def __init__(self, decoder_mlp_dim: int = 2048, **kwargs: Any) -> None:
        self.decoder_mlp_dim = decoder_mlp_dim
        super().__init__(**kwargs)
        self.memory_attention.register_forward_pre_hook(_memory_in_own_dtype, with_kwargs=True)

    def _build_sam_heads(self) -> None:
        super()._build_sam_heads()
        if self.decoder_mlp_dim != 2048:  # hard-coded in sam2, too wide for nano
            self.sam_mask_decoder.transformer = TwoWayTransformer(
                depth=2, embedding_dim=self.hidden_dim, mlp_dim=self.decoder_mlp_dim, num_heads=8
            )

    def track_step(self, frame_idx: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Track one frame: with ground truth as in training (returns all click steps), else as in the predictor."""
        self.tracked_frame = frame_idx
        step = SAM2Train.track_step if "gt_masks" in kwargs else SAM2Base.track_step
        return step(self, frame_idx, *args, **kwargs)

    def track_frames(self, backbone_out: dict[str, Any], batch: Any) -> list[dict[str, Any]]:
        """`SAM2Train.forward_tracking`, with the object pointers: the outputs of each frame, in the frames' order.

        Args:
            backbone_out: of `prepare_prompt_inputs`.
            batch: clips, a `BatchedVideoDatapoint`.
        """
        outputs = self.forward_tracking(backbone_out, batch, return_dict=True)
        frames = {**outputs["cond_frame_outputs"], **outputs["non_cond_frame_outputs"]}
        return [frames[index] for index in sorted(frames)]

    def _prepare_memory_conditioned_features(self, **step: Any) -> Tensor:
        if self.memory_reader is None or step["is_init_cond_frame"]:
            return super()._prepare_memory_conditioned_features(**step)
        known = self.memory_reader.condition(
            self,
            step["current_vision_feats"][-1],
            step["current_vision_pos_embeds"][-1],
            step["output_dict"],
            frame_idx=step["frame_idx"],
            num_frames=step["num_frames"],
            reverse=step["track_in_reverse"],
        )
        return known.permute(1, 2, 0).unflatten(2, step["feat_sizes"][-1])  # (B, C, H, W)

    @torch.inference_mode()
    def init_state(
        self,
        video_path: str | Path | bytes | Sequence[Tensor] | Iterable[Tensor],
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
        *,
        video_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Start a video from a path or from frames, which are read on access.

        `video_reader` opens paths; without it `sam2` reads a whole JPEG folder or mp4.

        Args:
            video_path: a path, or normalized frames, each float (3, image_size, image_size): a sequence, or a stream
                (any other iterable) of unknown length. A stream's latest `num_maskmem` frames can be prompted; its
                object pointers are encoded as in a video of at least `max_obj_ptrs_in_encoder` frames.
            video_size: (height, width) of the returned masks; required with frames.

        Raises:
            UserError, now or while tracking: a frame has another size.
        """
        if isinstance(video_path, (str, Path)) and self.video_reader is not None:
            video_path, video_size = self.video_reader(video_path, self.image_size)
        if isinstance(video_path, (str, Path, bytes)):
            source = str(video_path) if isinstance(video_path, Path) else video_path
            started = super().init_state(source, offload_video_to_cpu, offload_state_to_cpu, async_loading_frames)
            return {**started, "model": weakref.ref(self)}
        if video_size is None:
            raise ValueError("video_size=(height, width) is needed when the video is given as a sequence of frames")
        is_sequence = hasattr(video_path, "__getitem__") and hasattr(video_path, "__len__")
        images = (
            CheckedFrames(video_path, self.image_size)  # type: ignore[arg-type]
            if is_sequence
            else FrameStream(video_path, self.image_size, max(self.num_maskmem, 1))  # type: ignore[arg-type]
        )
        state: dict[str, Any] = {
            "model": weakref.ref(self),
            "images": images,
            "num_frames": len(images),
            "offload_video_to_cpu": offload_video_to_cpu,
            "offload_state_to_cpu": offload_state_to_cpu,
            "video_height": video_size[0],
            "video_width": video_size[1],
            "device": self.device,
            "storage_device": torch.device("cpu") if offload_state_to_cpu else self.device,
            "obj_id_to_idx": OrderedDict(),
            "obj_idx_to_id": OrderedDict(),
            "obj_ids": [],
        }
        per_object = ("point_inputs", "mask_inputs", "output_dict", "temp_output_dict", "frames_tracked")
        for name in ("cached_features", "constants", *(f"{kind}_per_obj" for kind in per_object)):
            state[name] = {}
        return state

    def add_new_points_or_box(
        self, inference_state: dict[str, Any], frame_idx: int, obj_id: int, *args: Any, **kwargs: Any
    ) -> tuple[int, list[int], Tensor]:
        """Prompt as in `sam2`; raises UserError if the frame or the state cannot be used."""
        frame = self._check_prompt(inference_state, frame_idx, obj_id, reads=True)
        with _new_object_only_if_prompted(self, inference_state, obj_id):
            return super().add_new_points_or_box(inference_state, frame, obj_id, *args, **kwargs)

    def add_new_mask(
        self, inference_state: dict[str, Any], frame_idx: int, obj_id: int, mask: Tensor | np.ndarray
    ) -> tuple[int, list[int], Tensor]:
        """Prompt as in `sam2`; raises UserError if the frame, the mask's shape or the state cannot be used."""
        if np.ndim(mask) != 2:
            raise UserError(f"the mask has the shape {tuple(np.shape(mask))}: give one of (height, width)")
        frame = self._check_prompt(inference_state, frame_idx, obj_id, reads=False)
        with _new_object_only_if_prompted(self, inference_state, obj_id):
            return super().add_new_mask(inference_state, frame, obj_id, mask)

    def clear_all_prompts_in_frame(
        self, inference_state: dict[str, Any], frame_idx: int, obj_id: int, need_output: bool = True
    ) -> tuple[int, list[int], Tensor] | None:
        """Remove an object's prompts on a frame, as `sam2` does; UserError if there is no such frame or object."""
        self._check_owner(inference_state)
        if obj_id not in inference_state["obj_id_to_idx"]:
            raise UserError(f"there is no object {obj_id!r}, only {list(inference_state['obj_id_to_idx'])}")
        frame = checked_number(frame_idx, inference_state["num_frames"])
        return super().clear_all_prompts_in_frame(inference_state, frame, obj_id, need_output)

    def propagate_in_video(
        self,
        inference_state: dict[str, Any],
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """Track as in `sam2`; a stream is tracked to its end. Raises UserError if start or state cannot be used."""
        self._check_owner(inference_state)
        if max_frame_num_to_track is not None and max_frame_num_to_track < 0:
            raise UserError(f"max_frame_num_to_track={max_frame_num_to_track}: give 0 or more, or None for all")
        start = start_frame_idx
        if start is not None:
            start = checked_number(start, inference_state["num_frames"])
        elif prompted := _prompted_frames(inference_state):
            start = min(prompted)
        if self.memory_bound is not None and start is not None:
            self.memory_bound.check_start(self, inference_state, start, reverse=reverse)
        frames = super().propagate_in_video(inference_state, start, max_frame_num_to_track, reverse)
        try:
            for frame_idx, object_ids, masks in frames:
                if self.memory_bound is not None:
                    self.memory_bound.forget(self, inference_state, frame_idx)
                yield frame_idx, object_ids, masks
        except EndOfStream:
            return

    def _check_prompt(self, state: dict[str, Any], frame_idx: int, obj_id: int, *, reads: bool) -> int:
        self._check_owner(state)
        frame = checked_number(frame_idx, state["num_frames"])
        index = state["obj_id_to_idx"].get(obj_id)
        corrects = index is not None and frame in state["frames_tracked_per_obj"][index]
        if corrects and not state["output_dict_per_obj"][index]["cond_frame_outputs"]:  # an assertion in sam2
            raise UserError(
                f"frame {frame} of object {obj_id!r} cannot be corrected, its prompts were cleared: prompt it where "
                "they were and track it again, or remove_object and add it anew"
            )
        if self.memory_bound is not None:
            self.memory_bound.check_prompt(self, state, frame, obj_id, reads=reads)
        return frame

    def _check_owner(self, state: dict[str, Any]) -> None:
        owner = state.get("model")
        if owner is None or owner() is not self:
            raise UserError("this state was started by another model: start one with this model's init_state")


def _prompted_frames(state: dict[str, Any]) -> set[int]:
    """Conditioning frames of all objects, those prompted since they were last tracked included."""
    outputs = [*state["output_dict_per_obj"].values(), *state["temp_output_dict_per_obj"].values()]
    return {frame for output in outputs for frame in output["cond_frame_outputs"]}


@contextlib.contextmanager
def _new_object_only_if_prompted(model: SAM2, state: dict[str, Any], obj_id: int) -> Iterator[None]:
    """Context manager: sam2 adds an object before it looks at the prompt, and then cannot track for want of one."""
    is_new = obj_id not in state["obj_id_to_idx"]
    try:
        yield
    except Exception:
        if is_new:
            model.remove_object(state, obj_id, need_output=False)
        raise


def _memory_in_own_dtype(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # sam2 keeps memory in bfloat16 and casts it only by concatenation with object pointers, which may be absent
    memory = kwargs.get("memory")
    dtype = next(attention.parameters()).dtype
    if memory is None or memory.dtype == dtype or torch.is_autocast_enabled(memory.device.type):
        return None
    return args, {**kwargs, "memory": memory.to(dtype)}


def build_sam2(
    size: str = "nano", *, version: str = "2.1", image_size: int | None = None, drop_path_rate: float = 0.0
) -> SAM2:
    """SAM 2 with random weights.

    Args:
        size: one of `SIZES`.
        version: "2.1" or "2" (the nano sizes exist as 2.1 only).
        image_size: side of the square input in pixels, a multiple of 32; None for the size's own.
        drop_path_rate: stochastic depth of the trunk while training.

    Raises:
        UserError: unknown size or version, impossible image size.
    """
    config = model_config(size, version=version, image_size=image_size)
    config.image_encoder.trunk.drop_path_rate = drop_path_rate
    return instantiate(config, _recursive_=True).eval()


def model_config(size: str, *, version: str = "2.1", image_size: int | None = None) -> DictConfig:
    """Configuration for `build_sam2`: `sam2`'s YAML with our class, the resolution and nano's shape."""
    if size not in SIZES:
        near = get_close_matches(size, SIZES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.size={size!r} is unknown: choose one of {', '.join(SIZES)}{hint}")
    if version not in VERSIONS or (size in EMBEDDED and version != "2.1"):
        raise UserError(f"model.version={version!r} is unknown for size {size}: choose one of {', '.join(VERSIONS)}")
    image_size = image_size or SIZES[size].image_size
    if not 2 * STRIDE_PX <= image_size <= MAX_SIZE_PX or image_size % STRIDE_PX:
        raise UserError(
            f"model.image_size={image_size} is impossible: give a multiple of {STRIDE_PX} from {2 * STRIDE_PX} to "
            f"{MAX_SIZE_PX}"
        )
    name = f"sam{version}"
    path = importlib.resources.files("sam2") / "configs" / name / f"{name}_hiera_{SIZES[size].config}.yaml"
    config = OmegaConf.create(path.read_text()).model
    # sam2's builders set these for inference; none has an effect in training
    config.sam_mask_decoder_extra_args = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    config.binarize_mask_from_pts_for_mem_enc = True
    config._target_ = f"{SAM2.__module__}.{SAM2.__qualname__}"
    config.image_size = image_size
    side = image_size // 16
    if size in EMBEDDED:
        config = OmegaConf.merge(config, NANO)
        # windows of stages 3 and 4 cover the whole image (Hiera's 14 and 7 tokens are made for 1024 px)
        config.image_encoder.trunk.window_spec = [8, 8, side, side // 2]
    for attention in (config.memory_attention.layer.self_attention, config.memory_attention.layer.cross_attention):
        attention.feat_sizes = [side, side]
    return config
