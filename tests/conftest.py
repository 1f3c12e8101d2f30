"""What several tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from small_predictors import write_models

from qsam2.models.sam2 import SIZES

settings.register_profile("qsam2", deadline=None, derandomize=True)  # a busy machine is slow now and then
settings.load_profile("qsam2")
torch.set_num_threads(1)  # small tensors; more threads wait for each other where the machine is busy
torch.manual_seed(0)  # what a module draws when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test or its fixtures draw without a seed of their own is the same in every run and every order."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """As `pytest_runtest_setup`: fixtures of a wider scope may or may not have drawn in between."""
    torch.manual_seed(0)


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
    side = SIZES["nano"].image_size
    return list(torch.randn(6, 3, side, side, generator=generator))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a terminal gives; a shell that starts a process in the background makes it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a small model: `float`, and `packed`, a run folder."""
    return write_models(tmp_path_factory.mktemp("models"))
