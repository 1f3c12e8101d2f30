"""A small model to score."""

from __future__ import annotations

import copy

import pytest
from small_models import seeing

from qsam2.models import SAM2


@pytest.fixture(scope="session")
def pristine() -> SAM2:
    return seeing(image_size=64)


@pytest.fixture
def model(pristine: SAM2) -> SAM2:
    """nano with random weights for pictures of 64 px, which sees objects."""
    return copy.deepcopy(pristine)
