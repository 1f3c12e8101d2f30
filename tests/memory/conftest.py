"""The model that the tests of memory share."""

from __future__ import annotations

import copy

import pytest
from small_videos import random_nano

from qsam2.models import SAM2


@pytest.fixture(scope="session")
def untouched_nano() -> SAM2:
    return random_nano()


@pytest.fixture
def model(untouched_nano: SAM2) -> SAM2:
    """nano with random weights for pictures of 64 px, whose memory matters."""
    return copy.deepcopy(untouched_nano)
