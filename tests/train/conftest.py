"""Meta's fine-tuning recipe, and clips to train on."""

from __future__ import annotations

import importlib.resources

import pytest
from omegaconf import DictConfig, OmegaConf
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.data.synthetic.moving_objects import moving_objects

SIZE_PX = 64
MOSE = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"


@pytest.fixture(scope="session")
def meta() -> DictConfig:
    """`trainer` of sam2.1_hiera_b+_MOSE_finetune.yaml, as it stands in the `sam2` package."""
    for name, resolve in {"times": lambda x, y: x * y, "divide": lambda x, y: x / y}.items():
        OmegaConf.register_new_resolver(name, resolve, replace=True)
    return OmegaConf.create((importlib.resources.files("sam2") / MOSE).read_text()).trainer


@pytest.fixture(scope="session")
def batch() -> BatchedVideoDatapoint:
    """Two clips of three frames, with three objects together."""
    clips = ClipDataset(
        moving_objects("train", 4), num_frames=3, max_objects=2, image_size=SIZE_PX, length=4, augment=False
    )
    return collate_clips([clips[0], clips[1]])
