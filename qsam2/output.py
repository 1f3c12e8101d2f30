"""Output of the program: files written whole or not at all, tables of plain text, the version that wrote them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsam2.errors import UserError, shortened

if TYPE_CHECKING:
    from torch import Tensor


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

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing of the file is left.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
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


def read_json(file: Path, remedy: str = "copy it again, or carry out the run anew") -> Any:
    """Values of a JSON file that qsam2 wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
        json.dumps(values, ensure_ascii=False).encode()  # halves of surrogate pairs cannot be written into a page
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({shortened(str(error))}): {remedy}") from error


def listed(names: Sequence[str]) -> str:
    """The first three names and the number of the others: "a, b, c and 7 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as text, columns left-aligned and two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
