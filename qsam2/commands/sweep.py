"""`qsam2 sweep` and `qsam2 table`: two words for one command, which takes files of both formats."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from qsam2.commands.common import Commands, add_parser, check_positive, log, quiet_logs
from qsam2.errors import UserError

if TYPE_CHECKING:
    from qsam2.sweep.definition import Sweep

EXAMPLES = {
    "sweep": """examples:
  qsam2 sweep recipes/sweeps/bits.yaml --dry-run
  qsam2 sweep recipes/sweeps/calibration.yaml --jobs 2 --count 12
  qsam2 sweep recipes/sweeps/methods.yaml data.val=davis:/data/DAVIS:val

FILE is a sweep in Weights & Biases' format, whose command names a recipe. If you are logged in, the sweep is created on
wandb.ai and this machine is its first agent; others join with the command that is shown. Without an account, or with
log.wandb=offline, Optuna draws the runs here and they are logged offline as one group.""",
    "table": """examples:
  qsam2 table recipes/tables/qat.yaml --jobs 2 --write docs/qat.md
  qsam2 table recipes/tables/ptq.yaml --keep docs/tables/ptq.json

FILE is a table, which compares methods at several settings. --write puts it between <!-- table:NAME --> and
<!-- /table:NAME --> of a Markdown file and its figures into docs/tables/NAME.json beside it (tables/NAME.json if the
file is in docs/). --keep takes cells from such a JSON file instead of running them, if their recipes, seeds, data and
checkpoints are still those of the table.""",
}
BOTH = """

Each run is a process with a run folder and a log. The same command goes on where it was stopped: finished runs are not
repeated, a run that was cut off resumes, a failed run is marked and tried again. qsam2 {other} is the same command with
the examples of a {other}."""
SUMMARIES = {
    "sweep": "carry out many runs of a recipe and rank them",
    "table": "compare methods at several settings, a run a cell",
}

TABLES_ONLY = ("keep", "write", "render", "only")
SWEEPS_ONLY = ("count",)


def add(commands: Commands) -> None:
    """The parsers of `qsam2 sweep` and `qsam2 table`."""
    usage = """%(prog)s [-h] FILE [--output DIR] [--jobs N] [--dry-run] [key=value ...]
       sweeps: [--count N]    tables: [--keep RESULTS] [--write DOCUMENT] [--render] [--only RUN]"""
    resumes = "goes on: finished runs are not repeated"
    for word, other in (("sweep", "table"), ("table", "sweep")):
        epilog = EXAMPLES[word] + BOTH.format(other=other)
        parser = add_parser(commands, word, _run, SUMMARIES[word], epilog, usage, resumes=resumes)
        parser.add_argument("file", type=Path, metavar="FILE", help="YAML, or a name that qsam2 recipes lists")
        parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweeps/NAME)")
        parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
        parser.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time")
        parser.add_argument("--count", type=int, metavar="N", help="sweep: end after N runs (default: its run_cap)")
        parser.add_argument("--keep", type=Path, metavar="RESULTS", help="table: JSON whose cells are not run again")
        parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="table: put it into this Markdown file")
        parser.add_argument("--render", action="store_true", help="table: write what is finished, run nothing")
        parser.add_argument("--only", metavar="RUN", help="table: carry out this one run, in this process")


def _run(options: argparse.Namespace) -> None:
    from qsam2.sweep.definition import is_table

    check_positive(options, "jobs", "count")
    table = is_table(options.file)
    for flag in SWEEPS_ONLY if table else TABLES_ONLY:
        if getattr(options, flag):
            kind, other = ("table", "sweep") if table else ("sweep", "table")
            raise UserError(f"--{flag}: {options.file} is a {kind}, and this is for a {other}; leave it out")
    (_table if table else _sweep)(options)


def _sweep(options: argparse.Namespace) -> None:
    from qsam2.sweep.definition import load_sweep

    sweep = load_sweep(options.file, options.overrides)
    folder = options.output or Path("runs", "sweeps", sweep.name)
    quiet_logs(options)
    from qsam2.train.loggers import has_wandb_key

    if options.dry_run:
        print(_list_sweep(sweep, folder, options.count, options.jobs))
        return
    if sweep.logs_online and has_wandb_key():
        from qsam2.sweep.agent import run_agent

        run_agent(sweep, folder, runs=options.count, jobs=options.jobs)
        return
    from qsam2.sweep.runner import carry_out
    from qsam2.sweep.study import Study, ranked, sweep_text, write_sweep

    study = Study(sweep, folder, options.count)
    carry_out(study, options.jobs)
    runs = ranked(sweep, study.states())
    best = write_sweep(sweep, runs, folder)
    print(sweep_text(sweep, runs))
    if best:
        print(f"best: {best}")
    print(f"to upload: wandb sync {folder}/*/wandb/offline-run-*")


def _list_sweep(sweep: Sweep, folder: Path, count: int | None, jobs: int) -> str:
    """The runs of a sweep, or the parameters that are drawn, as text; starts nothing."""
    from qsam2.sweep.definition import STUDY, combinations, count_runs
    from qsam2.sweep.runner import RunState, list_runs

    total = count_runs(sweep, count)
    states: list[RunState] = []
    if (folder / STUDY).is_file():
        from qsam2.sweep.study import Study

        states = Study(sweep, folder, count).states()
    begun = {run.name for run in states}
    if sweep.definition.method == "grid":
        numbered = {f"{index:03d}": values for index, values in zip(range(total), combinations(sweep), strict=False)}
        states += [RunState(name, "to come", values) for name, values in numbered.items() if name not in begun]
    drawn = [] if sweep.definition.method == "grid" else sweep.drawn.items()
    lines = [f"{sweep.definition.method}: {key} is {parameter}" for key, parameter in drawn]
    return "\n".join([*lines, list_runs(states, total, jobs, sweep.run_seconds)])


def _table(options: argparse.Namespace) -> None:
    from qsam2.sweep.table import float_runs, load_table, table_runs

    table = load_table(options.file)
    folder = options.output or Path("runs", "tables", table.name)
    runs = table_runs(table, folder, options.overrides)
    quiet_logs(options)
    if options.only:
        named = {run.name: run for run in [*float_runs(runs), *runs]}
        if options.only not in named:
            raise UserError(f"--only {options.only}: no such run; --dry-run lists them")
        from qsam2.sweep.scores import score_run

        score_run(table, named[options.only])
        return
    from qsam2.sweep.results import collect, extract, left_to_run, read_results, write_table
    from qsam2.sweep.runner import carry_out, list_runs
    from qsam2.sweep.scores import TablePlan

    earlier, to_run = None, runs
    if options.keep:
        earlier = read_results(options.keep, table)
        to_run = left_to_run(table, runs, earlier)
        log.info("%s: %d of %d runs are kept", options.keep, len(runs) - len(to_run), len(runs))
    command = ["table", str(options.file), "--output", str(folder), *options.overrides]
    plan = TablePlan(table, to_run, folder, command)
    if options.dry_run:
        print(list_runs(plan.states(), plan.total, options.jobs, plan.run_seconds))
        return
    if options.write:
        extract(options.write, table.name)  # a document without the markers is an error before the runs
    if not options.render:
        carry_out(plan, options.jobs)
    jobs = ["--jobs", str(options.jobs)] if options.jobs > 1 else []
    write = ["--write", os.path.relpath(options.write)] if options.write else []
    words = ["qsam2", "table", os.path.relpath(options.file), *jobs, *write, *options.overrides]
    print(write_table(table.name, collect(table, runs, shlex.join(words), earlier), folder, options.write))
