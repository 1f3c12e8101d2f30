"""What several tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("qsam2", deadline=None, derandomize=True)  # a busy machine is slow now and then
settings.load_profile("qsam2")
torch.set_num_threads(1)  # small tensors; more threads wait for each other where the machine is busy


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data; tests that want it are skipped where QSAM2_DATA is not set."""
    root = os.environ.get("QSAM2_DATA")
    if not root:
        pytest.skip("QSAM2_DATA is not set: it is the folder with the real data (davis16_240p, golden_jf, ...)")
    return Path(root)


@pytest.fixture
def frames() -> list[torch.Tensor]:
    """Six frames of noise at nano's resolution."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(6, 3, 256, 256, generator=generator))
