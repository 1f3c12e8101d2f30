"""Any MODEL behind the interfaces of `sam2`'s own predictors; `qsam2` offers these functions by their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor

from qsam2.data.footage import FrameFolder, VideoFile
from qsam2.data.video import Video
from qsam2.errors import UserError
from qsam2.fast.model import FAST_MEMORY, make_fast
from qsam2.loading import load_model
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.tasks import stills
from qsam2.tasks.tracking import FrameSequence


def load(
    model: str | Path, overrides: Sequence[str] = (), *, device: str | torch.device = "cpu", fast: bool = False
) -> SAM2:
    """A model in eval mode, its memory as its recipe says.

    Args:
        model: a run folder, a file (packed, float or a checkpoint) or a size, as on the command line.
        overrides: `key=value` on top of the model's own recipe.
        fast: made for speed, see `make_fast`; keys and values of remembered frames are kept (`memory.cache=true`).

    Raises:
        UserError: there is no such model, it cannot be read, an override is wrong, or the device is not there.
    """
    device = _checked_device(device)
    loaded, recipe = load_model(model, [*FAST_MEMORY, *overrides] if fast else overrides)
    loaded = loaded.to(device)
    if fast:
        loaded = make_fast(loaded)
    use_memory(loaded, recipe.memory)
    return loaded


def image_predictor(
    model: str | Path, overrides: Sequence[str] = (), *, device: str | torch.device = "cpu", fast: bool = False
) -> SAM2ImagePredictor:
    """`sam2`'s `SAM2ImagePredictor` over any MODEL, at the model's own resolution. Arguments and errors as `load`."""
    return stills.image_predictor(load(model, overrides, device=device, fast=fast))


def video_predictor(
    model: str | Path, overrides: Sequence[str] = (), *, device: str | torch.device = "cpu", fast: bool = False
) -> SAM2:
    """A model with the interface of `sam2`'s `SAM2VideoPredictor` that holds no more of a video than it still needs.

    `init_state` takes a folder of JPEG or PNG frames or a video file (`read_video`), or frames. Masks are those of
    `sam2`'s predictor, but the state is bounded: a frame that was forgotten cannot be corrected, which is a UserError
    (`overrides=["memory.bounded=false"]` keeps everything, as `sam2` does). Arguments and errors as `load`.
    """
    predictor = load(model, ["memory.bounded=true", *overrides], device=device, fast=fast)
    predictor.video_reader = read_video
    return predictor


def open_video(path: str | Path) -> Video:
    """A folder of frames, in the order of their numbers, or a video file; frames are read when they are asked for.

    Raises:
        UserError: there is no such path, or no video there.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a picture, a folder of frames or a video file")
    return VideoFile(path)


def read_video(path: str | Path, image_size: int) -> tuple[Sequence[Tensor], tuple[int, int]]:
    """What `SAM2.init_state` makes of a path: see `open_video`."""
    video = open_video(path)
    return FrameSequence(video, image_size, len(video)), video.size


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is none that PyTorch knows: give cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; give cpu")
    return found
