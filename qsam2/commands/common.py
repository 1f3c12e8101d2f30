"""Parts that commands share: the look of their help, quiet libraries, room for what they write."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any, TypeAlias

from qsam2.errors import UserError
from qsam2.output import quiet_libraries

log = logging.getLogger("qsam2")

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def texts(summary: str, epilog: str) -> dict[str, Any]:
    """Arguments of `add_parser`: the line in the list of commands, the description, the examples below the flags."""
    return {
        "help": summary,
        "description": summary[0].upper() + summary[1:] + ".",
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def make_room(file: Path) -> None:
    """Make the folder of an output before the work, so that a wrong path is not found after it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {file}: its folder cannot be made ({error.strerror}); give another path") from error
    if file.is_dir():
        raise UserError(f"--json {file}: is a folder; give the path of a file")


def quiet_logs(*, trains: bool = True) -> None:
    """Show our log as plain lines, warnings alone of libraries; `trains`: Lightning will be used, and is imported."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    quiet_libraries(trains=trains)


def check_model(target: str) -> None:
    """Refuse a MODEL that cannot be before anything heavy is imported; raises UserError."""
    from qsam2.recipe.load import SIZES

    if target not in SIZES and not Path(target).exists():
        raise UserError(f"{target} is no run folder, no model file and no size ({', '.join(SIZES)})")
