"""The command line: `qsam2 COMMAND`; each command is a module of `qsam2/commands/`."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from qsam2.commands import benchmark, evaluate, export, predict, quantize, recipes, report, sensitivity, sweep, train
from qsam2.commands.common import without_bars
from qsam2.errors import UserError
from qsam2.output import version

PARENT = "QSAM2_PARENT"
"""Environment variable: the id of the `qsam2` that started this one, which is not to outlive it."""
POLL_S = 1.0
"""Seconds between two looks whether the parent still runs."""

WAITING = ("OMP_WAIT_POLICY", "PASSIVE")
"""For OpenMP, which reads it when torch is loaded. A thread that spins while it waits for another one takes the core
that the other one needs when further processes are busy; see docs/experiments.md."""

FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""Errors of the file system that another path, or other rights, put right."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
    message, status, options = "", 0, None
    os.environ.setdefault(*WAITING)
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that it cannot show
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with stopped_by_sigterm(), without_bars() if options.quiet else nullcontext():
            options.run(options)
            sys.stdout.flush()
    except UserError as error:
        message, status = f"error: {error}", 2
    except BrokenPipeError:
        if not _is_unread():
            raise
        status = 128 + signal.SIGPIPE  # as other programs end in `qsam2 ... | head`
    except OSError as error:
        if error.errno in UNUSABLE and error.filename:
            used = UserError(f"{error.filename} cannot be used: {error.strerror}; give another path, or rights to it")
            message, status = f"error: {used}", 2
        elif error.errno in FULL:
            where = f" for {error.filename}" if error.filename else ""
            message, status = f"error: no room on the disk{where}: make some and give the same command again", 2
        else:
            raise
    except (KeyboardInterrupt, SystemExit) as ended:  # Lightning makes the second of the first
        if isinstance(ended, SystemExit) and not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        status = 130
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all ranks
            message = f"stopped; the same command {options.resumes if options else 'begins anew'}"
    if message:
        _end_progress_bars()
        print(message, file=sys.stderr)
    return status


def _is_unread() -> bool:
    """True if nobody reads stdout any longer; what is left for it is thrown away then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _end_progress_bars() -> None:
    """End the line of bars that an error left open, so that a message begins a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.leave = True
            bar.close()


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that they look like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all of its commands."""
    parser = _Parser(prog="qsam2", description="Quantization of Segment Anything Model 2.")
    parser.add_argument("--version", action="version", version=f"qsam2 {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (quantize, recipes, train, evaluate, predict, export, sweep, sensitivity, report, benchmark):
        command.add(commands)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Arguments as the command's parser reads them, its overrides (`key=value`) apart; raises UserError."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = [action for command in commands.choices.values() for action in command._actions]
    switches = {flag for action in actions if action.nargs == 0 for flag in action.option_strings}
    overrides: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_value = before.startswith("--") and "=" not in before and before not in switches
        (overrides if _is_override(word) and not is_value else others).append(word)
    options, unknown = parser.parse_known_args(others)
    if unknown:
        raise UserError(
            f"unknown argument {unknown[0]!r}: a key of the recipe is written key=value, without dashes; "
            f"flags are in qsam2 {options.command} --help"
        )
    options.overrides = overrides
    return options


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")  # a path with = in it has a slash, or belongs to the flag before it
    return bool(equals) and "/" not in key and not key.startswith("-")


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is Ctrl-C meanwhile, and comes by itself once the `qsam2` that started this one has ended.

    Runs of a table or sweep have such a parent, and the ranks of a run that has several devices.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set handlers
        yield
        return
    before, parent = signal.signal(signal.SIGTERM, signal.default_int_handler), os.environ.get(PARENT)
    if parent == str(os.getppid()):
        threading.Thread(target=_stop_without, args=(int(parent),), daemon=True).start()
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]
        if parent:
            os.environ[PARENT] = parent
        signal.signal(signal.SIGTERM, before)


def _stop_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
