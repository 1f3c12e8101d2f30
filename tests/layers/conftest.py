"""The model that the tests of this folder share."""

from __future__ import annotations

import copy

import pytest
import torch
from small_sam2 import build_small_sam2

from qsam2.models import SAM2


@pytest.fixture(scope="session")
def pristine() -> SAM2:
    torch.manual_seed(0)
    model = build_small_sam2()
    # Random weights see no object, and what follows from masks would go untested.
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[2].bias, 10.0)
    return model


@pytest.fixture
def model(pristine: SAM2) -> SAM2:
    """A SAM2 of 0.5 million random weights for pictures of 64 px."""
    return copy.deepcopy(pristine)
