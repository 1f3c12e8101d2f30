"""Settings and fixtures of all tests."""

import copy
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from messages import Message, key_of
from small_models import seeing
from small_predictors import write_models
from small_runs import FinishedRuns, write_checkpoint

from qsam2.models import SAM2
from qsam2.models.sam2 import SIZES

# torch.compile's cache does not tell vector widths apart: kernels cached for another width compute garbage
CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "native")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{CAPABILITY}"))
settings.register_profile("qsam2", deadline=None, derandomize=True)  # a busy machine is slow now and then
settings.load_profile("qsam2")
torch.set_num_threads(1)  # small tensors; more threads wait for each other where the machine is busy
torch.manual_seed(0)  # for what modules draw when they are imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what a test and its fixtures draw, so that it is the same in every run and every order."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Seed again: fixtures of a wider scope may or may not have drawn in between."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data; skips the test if QSAM2_DATA is not set."""
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
    """Ctrl-C raises, as in a terminal: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-messages", action="store_true", help="write tests/snapshots/messages.json anew")


@pytest.fixture
def message(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Message]:
    """Checks an error's wording against the snapshot and returns it: see `helpers/messages.py`."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folders = {tmp_path: "TMP", base: "SESSION", session: "SESSION", request.config.rootpath: "REPO"}
    message = Message(key_of(request.node), folders, request.config.getoption("--refresh-messages"))
    yield message
    if message.refresh:
        message.write()


@pytest.fixture(scope="session")
def pristine() -> SAM2:
    return seeing(image_size=64)


@pytest.fixture
def model(pristine: SAM2) -> SAM2:
    """Nano for 64 px with random weights, which sees objects."""
    return copy.deepcopy(pristine)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano for 64 px with random weights, in Meta's checkpoint format."""
    return write_checkpoint(tmp_path_factory)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs, `qat`, `ptq`, `float` and `reconstructed` (`small_runs.RUNS`), for reading."""
    return FinishedRuns(tmp_path_factory)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a small model: `float`, and `packed`, a run folder."""
    return write_models(tmp_path_factory.mktemp("models"))
