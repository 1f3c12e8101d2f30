"""Parts that commands share: the look of their help, quiet libraries, the file of --json."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from qsam2.errors import UserError
from qsam2.output import quiet_libraries, write_text

RESUMES = "goes on from what the run folder holds"
"""Words for Ctrl-C: the same command, given again after it was stopped, ..."""

log = logging.getLogger("qsam2")

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_parser(
    commands: Commands,
    name: str,
    run: Callable[[Any], None],
    summary: str,
    epilog: str,
    usage: str | None = None,
    *,
    resumes: str = "begins anew",
) -> argparse.ArgumentParser:
    """The parser of a command, which `run` carries out.

    `epilog` shows examples, `usage` replaces argparse's own, `resumes` says what the command does after it was stopped.
    """
    parser = commands.add_parser(name, help=summary, epilog=epilog, usage=usage)
    parser.description = summary[0].upper() + summary[1:] + "."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run, resumes=resumes)
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--verbose", action="store_true", help="show everything that is logged, such as all layers")
    said.add_argument("--quiet", action="store_true", help="show warnings and results alone, no progress")
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


class _AboveBars(logging.Handler):
    """Writes each record to stderr as a line of its own, above the progress bars that are open."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def quiet_logs(options: argparse.Namespace, *, trains: bool = True) -> None:
    """Show our log as plain lines, warnings alone of libraries, as --verbose and --quiet say.

    `trains`: Lightning will be used, and is imported.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_AboveBars()])
    log.setLevel(logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO)
    quiet_libraries(trains=trains)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Context manager: all progress bars, those of libraries included, stay hidden."""
    import tqdm

    before: Any = vars(tqdm.tqdm)["__init__"]
    shown = tqdm.tqdm.__init__

    def hidden(bar: Any, *args: Any, **values: Any) -> None:
        shown(bar, *args, **{**values, "disable": True})

    tqdm.tqdm.__init__ = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = before  # type: ignore[method-assign]


def check_model(target: str) -> None:
    """Refuse a MODEL that cannot be before anything heavy is imported; raises UserError."""
    from qsam2.recipe.load import SIZES

    if target not in SIZES and not os.path.exists(target):  # False, too, of what no path can be
        raise UserError(f"{target} is no run folder, no model file and no size ({', '.join(SIZES)})")
