"""`qsam2 report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsam2.commands.common import Commands, add_parser, quiet_logs
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 report runs/qat-w4a4
  qsam2 report runs/qat-w4a4 runs/ptq-w4a4 --out comparison.html

Of one run the page that the run itself wrote last, drawn anew from what its folder keeps; no model is run. Of an
unfinished run what there is, and which stages are to come. Of several runs their scores side by side, against bytes
with the Pareto front, and what their recipes differ in. The page is one file that needs no network."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 report`."""
    summary, usage = "show a run, or compare several, as one HTML page", "%(prog)s [-h] RUN [RUN ...] [--out FILE]"
    parser = add_parser(commands, "report", _report, summary, EPILOG, usage)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    default = "RUN/report.html (RUN/unfinished.html of one that is not finished), comparison.html of several"
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {default}")


def _report(options: argparse.Namespace) -> None:
    if options.overrides:
        raise UserError(f"{options.overrides[0]} does nothing here: a report shows a run as it was")
    quiet_logs(options)
    from qsam2.output import write_text
    from qsam2.report.compare import render_comparison
    from qsam2.report.page import REPORT, render
    from qsam2.report.read import as_runs_write, read_run

    runs = [read_run(path) for path in options.runs]
    single = runs[0].path / ("unfinished.html" if runs[0].missing_stages else REPORT)
    file = options.out or (single if len(runs) == 1 else Path("comparison.html"))
    if file.is_dir():
        raise UserError(f"--out {file}: is a folder; give the path of a file")
    if any(run.missing_stages and file.resolve() == (run.path / REPORT).resolve() for run in runs):
        raise UserError(f"--out {file}: that run is not finished, and this file says that it is; give another path")
    with as_runs_write(runs):
        page = render_comparison(runs) if len(runs) > 1 else render(runs[0])
    write_text(file, page)
    print(file)
