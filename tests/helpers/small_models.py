"""Models with random weights, and generated stills, for tests of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qsam2.data.synthetic.moving_objects import moving_objects
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
        ids = sum(number * mask.astype(np.uint8) for number, mask in video.masks(0).items())
        Image.fromarray(video.frame(0)).save(folder / f"images/{video.name}.png")
        Image.fromarray(ids, "L").save(folder / f"instance_png/{video.name}.png")
    return f"instance_png:{folder}"
