"""What whole runs start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import seeing


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for 64 px with random weights, as one of Meta's checkpoint files."""
    file = tmp_path_factory.mktemp("checkpoint") / "nano.pt"
    torch.save({"model": seeing().state_dict()}, file)
    return file
