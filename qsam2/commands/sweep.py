"""`qsam2 sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsam2.commands.common import Commands, quiet_logs, texts
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 sweep recipes/sweeps/bits.yaml --dry-run
  qsam2 sweep recipes/sweeps/calibration.yaml --jobs 2 --count 12
  qsam2 sweep recipes/sweeps/methods.yaml data.val=davis:/data/DAVIS:val

SWEEP is a file in Weights & Biases' sweep format, whose command names a recipe. Where you are logged in, the sweep is
created there and this machine is its first agent; others join with the command that it prints. Without an account, or
with log.wandb=offline, the runs are drawn here, each a process and a run folder, logged offline into one group.
The same command goes on where it was stopped: finished runs are not repeated, one that was cut off resumes, a failed
one is marked and tried again."""


def add_sweep(commands: Commands) -> None:
    """The parser of `qsam2 sweep`."""
    parser = commands.add_parser("sweep", **texts("carry out many runs of a recipe and compare them", EPILOG))
    parser.usage = "%(prog)s [-h] SWEEP [--output DIR] [--count N] [--jobs N] [--dry-run] [key=value ...]"
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a YAML file, as in recipes/sweeps/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweeps/NAME)")
    parser.add_argument("--count", type=int, metavar="N", help="end after N runs (default: the file's run_cap)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on this machine (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time")
    parser.set_defaults(run=_sweep)


def _sweep(given: argparse.Namespace) -> None:
    from qsam2.sweep.definition import load_sweep

    for flag in ("jobs", "count"):
        if (number := getattr(given, flag)) is not None and number < 1:
            raise UserError(f"--{flag} {number}: give at least 1")
    sweep = load_sweep(given.sweep, given.overrides)
    folder = given.output or Path("runs", "sweeps", sweep.name)
    quiet_logs()
    from qsam2.train.loggers import has_wandb_key

    if not given.dry_run and sweep.logs_online and has_wandb_key():
        from qsam2.sweep.online import run_agent

        run_agent(sweep, folder, runs=given.count, jobs=given.jobs)
        return
    from qsam2.sweep.local import list_runs, results_table, run_sweep

    if given.dry_run:
        print(list_runs(sweep, folder, given.count, given.jobs))
        return
    board = run_sweep(sweep, folder, runs=given.count, jobs=given.jobs)
    print(results_table(sweep, board))
    if board and board[0].metric is not None:
        print(f"best: {sweep.command_of(board[0].values)}")
    print(f"to upload: wandb sync {folder}/*/wandb/offline-run-*")
