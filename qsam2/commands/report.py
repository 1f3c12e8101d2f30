"""`qsam2 report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qsam2.commands.common import Commands, quiet_logs, texts
from qsam2.errors import UserError

if TYPE_CHECKING:
    from qsam2.report.read import SavedRun

EPILOG = """examples:
  qsam2 report runs/qat-w4a4
  qsam2 report runs/qat-w4a4 runs/ptq-w4a4 --out comparison.html

Of one run the page that the run itself wrote last, drawn anew from what its folder keeps; no model is run. Of an
unfinished run what there is, and which stages are to come. Of several runs their scores side by side, against bytes and
time with the Pareto front, and what their recipes differ in. The page is one file that needs no network."""


def add_report(commands: Commands) -> None:
    """The parser of `qsam2 report`."""
    parser = commands.add_parser("report", **texts("show a run, or compare several, as one HTML page", EPILOG))
    parser.usage = "%(prog)s [-h] RUN [RUN ...] [--out FILE]"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html (RUN/unfinished.html of one that is not finished), comparison.html of several",
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    if options.overrides:
        raise UserError(f"{options.overrides[0]} does nothing here: a report shows a run as it was")
    quiet_logs()
    from qsam2.output import write_text
    from qsam2.report.compare import render_comparison
    from qsam2.report.page import REPORT, render
    from qsam2.report.read import read_run

    runs = [read_run(path) for path in options.runs]
    file = options.out or _default(runs)
    if file.is_dir():
        raise UserError(f"--out {file}: is a folder; give the path of a file")
    if any(run.missing_stages and file.resolve() == (run.path / REPORT).resolve() for run in runs):
        raise UserError(f"--out {file}: that run is not finished, and this file says that it is; give another path")
    write_text(file, render_comparison(runs) if len(runs) > 1 else render(runs[0]))
    print(file)


def _default(runs: list[SavedRun]) -> Path:
    if len(runs) > 1:
        return Path("comparison.html")
    return runs[0].path / ("unfinished.html" if runs[0].missing_stages else "report.html")
