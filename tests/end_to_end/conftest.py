"""What whole runs start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qsam2.models import build_sam2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at 64 px a second thread mostly waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for 64 px with random weights, as one of Meta's checkpoint files."""
    torch.manual_seed(0)
    model = build_sam2("nano", image_size=64)
    # Random weights see no object: all masks would be empty, and all scores equal.
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[2].bias, 4.0)
    file = tmp_path_factory.mktemp("checkpoint") / "nano.pt"
    torch.save({"model": model.state_dict()}, file)
    return file
