"""`qsam2 table`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path

from qsam2.commands.common import Commands, log, quiet_logs, texts
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 table recipes/tables/qat.yaml --dry-run
  qsam2 table recipes/tables/qat.yaml --jobs 2 --write README.md
  qsam2 table recipes/tables/qat.yaml --output runs/tables/long trainer.max_steps=2000
  qsam2 table recipes/tables/ptq.yaml --keep docs/tables/ptq.json --write README.md

Each run is a process of its own, with its log in its folder. The same command goes on where it was stopped: finished
runs are not repeated, one that was cut off resumes, a failed one is marked in the table and tried again. --write puts
the table between <!-- table:NAME --> and <!-- /table:NAME -->, its figures into docs/tables/NAME.json beside it, or
tables/NAME.json where it lies in docs/ itself. --keep takes cells over from such a file, where the runs' folders are
gone or on another machine: those whose recipes, seeds, data and checkpoints are still the table's."""


def add_table(commands: Commands) -> None:
    """The parser of `qsam2 table`."""
    parser = commands.add_parser("table", **texts("carry out the runs of a table and write it", EPILOG))
    parser.usage = """%(prog)s [-h] TABLE [--output DIR] [--keep RESULTS] [--jobs N] [--write DOCUMENT] [key=value ...]
       %(prog)s [-h] TABLE [--output DIR] [--keep RESULTS] [--write DOCUMENT] --render [key=value ...]
       %(prog)s [-h] TABLE [--output DIR] [--keep RESULTS] --dry-run [key=value ...]
       %(prog)s [-h] TABLE [--output DIR] --only RUN [key=value ...]"""
    parser.add_argument("table", type=Path, metavar="TABLE", help="a YAML file, as in recipes/tables/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/tables/NAME)")
    parser.add_argument(
        "--keep", type=Path, metavar="RESULTS", help="JSON of the table: do not run again what it holds"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table into this Markdown file")
    parser.add_argument("--render", action="store_true", help="write what is finished, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time")
    parser.add_argument("--only", metavar="RUN", help="carry out this one run, in this process")
    parser.set_defaults(run=_table)


def _table(given: argparse.Namespace) -> None:
    from qsam2.sweep.table_definition import float_runs, load_table, table_runs

    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: give at least 1")
    table = load_table(given.table)
    output = given.output or Path("runs", "tables", table.name)
    runs = table_runs(table, output, given.overrides)
    quiet_logs()
    from qsam2.sweep.table_scores import carry_out

    if given.only:
        named = {run.name: run for run in [*float_runs(runs), *runs]}
        if given.only not in named:
            raise UserError(f"--only {given.only}: no such run; --dry-run lists them")
        carry_out(table, named[given.only])
        return
    from qsam2.sweep.table_markdown import extract, insert, render
    from qsam2.sweep.table_results import collect, left_to_run, read_results
    from qsam2.sweep.table_schedule import list_runs, run_table

    earlier, to_run = None, runs
    if given.keep:
        earlier = read_results(given.keep, table)
        to_run = left_to_run(table, runs, earlier)
        log.info("%s: %d of %d runs are kept", given.keep, len(runs) - len(to_run), len(runs))
    if given.dry_run:
        print(list_runs(table, to_run, given.jobs))
        return
    if given.write:
        extract(given.write, table.name)  # a document without the markers shows before the work
    name = os.path.relpath(given.table)
    if not given.render:
        command = ["table", str(given.table), "--output", str(output), *given.overrides]
        run_table(table, to_run, command=command, jobs=given.jobs)
    jobs = ["--jobs", str(given.jobs)] if given.jobs > 1 else []
    write = ["--write", os.path.relpath(given.write)] if given.write else []
    results = collect(table, runs, shlex.join(["qsam2", "table", name, *jobs, *write, *given.overrides]), earlier)
    text = render(results)
    from qsam2.output import write_text

    write_text(output / "table.json", json.dumps(results, indent=1))
    write_text(output / "table.md", text)
    if given.write:
        beside = given.write.absolute().parent
        docs = beside if beside.name == "docs" else beside / "docs"
        write_text(docs / "tables" / f"{table.name}.json", json.dumps(results, indent=1) + "\n")
        insert(given.write, table.name, text)
    print(text)
