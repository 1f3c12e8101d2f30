"""What a run keeps for its report beside its metrics: `report/` in the run folder, written by the stages that know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.run_folder import write_bytes, write_text

FOLDER = "report"
LAYERS, CLIPS, MEMORY = "layers.json", "clips.json", "memory.json"


def keep(run: Path, name: str, values: Any) -> None:
    """Write plain values; raises UserError where the disk is full."""
    write_text(run / FOLDER / name, json.dumps(values))


def keep_bytes(run: Path, name: str, data: bytes) -> None:
    """Write a picture or a video; raises UserError where the disk is full."""
    write_bytes(run / FOLDER / name, data)


def kept(run: Path, name: str) -> Any:
    """What `keep` wrote; None where the run kept no such file.

    Raises:
        UserError: the file is damaged.
    """
    return read_json(run / FOLDER / name)


def read_json(file: Path) -> Any:
    """A JSON file's values; None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): copy it again, or carry out the run anew") from error
