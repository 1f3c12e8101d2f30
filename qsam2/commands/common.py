"""Parts that commands share: the look of their help, quiet libraries, the file of --json."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from qsam2.errors import UserError
from qsam2.output import quiet_libraries, write_text

log = logging.getLogger("qsam2")

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_parser(
    commands: Commands, name: str, run: Callable[[Any], None], summary: str, epilog: str, usage: str | None = None
) -> argparse.ArgumentParser:
    """The parser of a command, which `run` carries out; `epilog` shows examples, `usage` replaces argparse's own."""
    parser = commands.add_parser(name, help=summary, epilog=epilog, usage=usage)
    parser.description = summary[0].upper() + summary[1:] + "."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)
    return parser


def make_room(file: Path | None) -> None:
    """Make the folder of --json before the work, so that a wrong path is not found after it."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {file}: its folder cannot be made ({error.strerror}); give another path") from error
    if file.is_dir():
        raise UserError(f"--json {file}: is a folder; give the path of a file")


def check_positive(options: argparse.Namespace, *flags: str) -> None:
    """Refuse numbers below 1; a flag that is left out may be None."""
    for flag in flags:
        if (number := getattr(options, flag)) is not None and number < 1:
            raise UserError(f"--{flag} {number}: give at least 1")


def write_json(file: Path | None, values: Any) -> None:
    """Write what a command found, if --json names a file."""
    if file:
        write_text(file, json.dumps(values, indent=1))


def quiet_logs(*, trains: bool = True) -> None:
    """Show our log as plain lines, warnings alone of libraries; `trains`: Lightning will be used, and is imported."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    quiet_libraries(trains=trains)


def check_model(target: str) -> None:
    """Refuse a MODEL that cannot be before anything heavy is imported; raises UserError."""
    from qsam2.recipe.load import SIZES

    if target not in SIZES and not os.path.exists(target):  # False, too, of what no path can be
        raise UserError(f"{target} is no run folder, no model file and no size ({', '.join(SIZES)})")
