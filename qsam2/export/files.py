"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qsam2.errors import UserError


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name in its folder, then rename it.

    Raises:
        UserError: the file could not be written; no part of it is left.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        save_file(dict(tensors), unfinished, dict(metadata))
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be written ({reason}): give a folder that exists and has room") from error
    finally:
        unfinished.unlink(missing_ok=True)
