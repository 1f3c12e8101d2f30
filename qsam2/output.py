"""Output of the program: files written whole or not at all, tables of plain text, the version that wrote them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import stat
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsam2 import inputs
from qsam2.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

OF_A_RUN = "copy it again, or carry out the run anew"
"""Advice on a damaged file of a run."""


def quiet_libraries(*, trains: bool = True) -> None:
    """Let the libraries underneath say only what is wrong; `trains`: Lightning will be used, and is imported."""
    if trains:
        import lightning.pytorch  # noqa: F401  (sets its loggers up, so they are quieted after it)

    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore",
        module=r"(lightning|torch(metrics|ao)?|training|sam2|tensordict|albumentations|brevitas)(\..*)?",
    )


def version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version("qsam2")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def code_version() -> str:
    """Version of qsam2; from a git checkout also its commit, with a + where the package's files have changed since."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return version()
    commit, changes = (
        subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "qsam2"])
    )
    return f"{version()} ({commit}{'+' if changes else ''})" if commit else version()


def code_digest() -> str:
    """SHA-256 of the package's source, and the versions of what computes with it: equal code gives equal results."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
    for package in ("torch", "sam2", "opencv-python-headless", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


def cpu_name() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows it
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns a full disk or an unwritable folder into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path} could not be written: {reason}; make room or give another path") from error


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `write` gets a temporary name beside it, which is then renamed.

    The folder is made if it is missing. Files that several processes write at once are safe: each has its own name.
    Permissions are those of any new file (umask), also where a library writes its files for their owner alone.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing of the file is left.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8, see `write_whole`."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write a binary file, see `write_whole`."""
    write_whole(file, lambda path: path.write_bytes(data))


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, see `write_whole`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(path: Path) -> None:
        try:
            save_file(dict(tensors), path, dict(metadata))
        except SafetensorError as error:  # what a full disk makes of it
            raise OSError(str(error)) from error

    write_whole(file, write)


def read_json(file: Path, shape: Any = Any, *, what: str = "", advice: str = OF_A_RUN) -> Any:
    """Values of a JSON file that qsam2 wrote, see `inputs.read_json`; None if there is no such file."""
    return inputs.read_json(file, shape, what=what, advice=advice) if file.is_file() else None


def encodable(text: str) -> str:
    """The text with ? for what UTF-8 cannot hold, as in file names of other encodings."""
    return text.encode(errors="replace").decode()


def listed(names: Sequence[str]) -> str:
    """The first three names and the number of the others: "a, b, c and 7 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as text, columns left-aligned and two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
