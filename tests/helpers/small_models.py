"""Models with random weights, and generated stills and videos on disk, for tests of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.video import Video
from qsam2.models import SAM2, build_sam2


def seeing(size: str = "nano", image_size: int = 64) -> SAM2:
    """Random weights see no object: all masks would be empty, and all scores equal. These see one."""
    torch.manual_seed(0)
    model = build_sam2(size, image_size=image_size)
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 4.0)
    return model


def write_stills(folder: Path) -> str:
    """Two generated pictures with their instances, as a source of data."""
    for kind in ("images", "instance_png"):
        (folder / kind).mkdir(parents=True)
    for video in moving_objects("val", 2, size=(64, 96)):
        Image.fromarray(video.frame(0)).save(folder / f"images/{video.name}.png")
        object_ids(video, 0).save(folder / f"instance_png/{video.name}.png")
    return f"instance_png:{folder}"


def write_davis(root: Path, video: Video, length: int) -> Path:
    """The first frames of a video as sequence `v` of a DAVIS folder, in the split `val`."""
    frames, masks = root / "JPEGImages/v", root / "Annotations/v"
    for folder in (frames, masks, root / "ImageSets"):
        folder.mkdir(parents=True)
    for index in range(length):
        Image.fromarray(video.frame(index)).save(frames / f"{index:05d}.png")
        object_ids(video, index).save(masks / f"{index:05d}.png")
    (root / "ImageSets/val.txt").write_text("v\n")
    return root


def object_ids(video: Video, index: int) -> Image.Image:
    """A frame's masks as a picture of object ids."""
    ids = sum(number * mask.astype(np.uint8) for number, mask in video.masks(index).items())
    return Image.fromarray(ids, "L")
