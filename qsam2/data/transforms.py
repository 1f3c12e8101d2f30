"""Decoded frames to model input, and the augmentation of training clips (with albumentations)."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qsam2.data.video import Video

if TYPE_CHECKING:
    import albumentations as A

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would otherwise query the network for a newer version
cv2.setNumThreads(0)  # loader workers are the parallelism

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resize_frame(frame: np.ndarray, image_size: int) -> np.ndarray:
    """RGB uint8 (H, W, 3) -> (S, S, 3): PIL's bicubic, as SAM2 resizes video frames."""
    return np.array(Image.fromarray(frame).resize((image_size, image_size)))


def normalize(frames: np.ndarray) -> torch.Tensor:
    """RGB uint8 (..., H, W, 3) -> float32 (..., 3, H, W), normalized by ImageNet's mean and deviation per channel."""
    images = torch.from_numpy(frames).movedim(-1, -3).to(torch.float32).div_(255.0)
    return images.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None]).contiguous()


def to_model_input(frame: np.ndarray, image_size: int) -> torch.Tensor:
    """RGB uint8 (H, W, 3) -> float32 (3, S, S), equal to `sam2.utils.misc.load_video_frames` bit for bit."""
    return normalize(resize_frame(frame, image_size))


def resize_masks(masks: np.ndarray, image_size: int) -> torch.Tensor:
    """bool (O, H, W) -> bool (O, S, S), as SAM2's video predictor resizes a mask prompt."""
    resized = F.interpolate(
        torch.from_numpy(masks).float()[None], (image_size, image_size), mode="bilinear", antialias=True
    )
    return resized[0] >= 0.5


class ClipAugmentation:
    """Meta's fine-tuning augmentation (sam2.1_hiera_b+_MOSE_finetune.yaml), drawn from a given generator.

    Once per clip: horizontal flip, affine (25 degrees, shear 20), colour jitter, grey 5 %; once per frame: colour
    jitter. If the affine would move an object of the first frame out of view, flip and affine are omitted (Meta omits
    the affine only).
    """

    def __init__(self, image_size: int) -> None:
        import albumentations as A  # takes a second: only for training

        self.image_size = image_size
        fill = tuple(round(255 * mean) for mean in MEAN)
        affine = A.Affine(rotate=(-25, 25), shear={"x": (-20, 20), "y": (0, 0)}, fill=fill, fill_mask=0, p=1.0)
        self._geometry = A.Compose([A.HorizontalFlip(p=0.5), affine])
        jitter = partial(A.ColorJitter, brightness=(0.9, 1.1), hue=(0, 0), p=1.0)
        clip_jitter = jitter(contrast=(0.97, 1.03), saturation=(0.97, 1.03))
        self._clip_colour = A.Compose([clip_jitter, A.ToGray(p=0.05)])
        self._frame_colour = A.Compose([jitter(contrast=(0.95, 1.05), saturation=(0.95, 1.05))])

    def __call__(
        self, frames: np.ndarray, masks: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (T, H, W, 3), bool (T, O, H, W) -> float32 (T, 3, S, S), bool (T, O, S, S)."""
        geometry_seed, colour_seed, frame_seed = (int(seed) for seed in rng.integers(2**31, size=3))
        moved_frames, moved_masks = [], []
        for frame, frame_masks in zip(frames, masks, strict=True):
            _seed(self._geometry, geometry_seed)
            moved = self._geometry(image=frame, masks=frame_masks.astype(np.uint8))
            moved_frames.append(moved["image"])
            moved_masks.append(np.asarray(moved["masks"]).astype(bool))
        if (masks[0].any((1, 2)) & ~moved_masks[0].any((1, 2))).any():
            moved_frames, moved_masks = list(frames), list(masks)
        images = []
        for t, frame in enumerate(moved_frames):
            _seed(self._clip_colour, colour_seed)
            image = self._clip_colour(image=resize_frame(frame, self.image_size))["image"]
            _seed(self._frame_colour, frame_seed + t)
            images.append(self._frame_colour(image=image)["image"])
        resized = torch.stack([resize_masks(frame_masks, self.image_size) for frame_masks in moved_masks])
        return normalize(np.stack(images)), resized


def _seed(transforms: A.Compose, seed: int) -> None:
    # one stream for all its transforms: set_random_seed would start each of them from the same draw
    transforms.set_random_state(np.random.default_rng(seed), random.Random(seed))


class FrameSequence(Sequence[Tensor]):
    """Model inputs, float (3, S, S) each, of a video's frames, decoded on access."""

    def __init__(self, video: Video, image_size: int, length: int) -> None:
        self.video, self.image_size, self.length = video, image_size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return to_model_input(self.video.frame(index), self.image_size)
