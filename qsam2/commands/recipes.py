"""`qsam2 recipes`."""

from __future__ import annotations

import argparse

from qsam2.commands.common import Commands, add_parser
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 recipes
  qsam2 recipes qat_w4a4 > my_recipe.yaml
  qsam2 train qat_w4a4 model.size=tiny data.train=davis data.root=/data/DAVIS

The names work from any folder: recipes for qsam2 train, sweeps for qsam2 sweep, tables for qsam2 table. A recipe of
your own may lie over one of them: base: qat_w4a4."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 recipes`."""
    summary = "list the shipped recipes, sweeps and tables, or print one"
    parser = add_parser(commands, "recipes", _recipes, summary, EPILOG, "%(prog)s [-h] [NAME]")
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this file")


def _recipes(options: argparse.Namespace) -> None:
    from qsam2.output import aligned
    from qsam2.recipe.load import FOLDERS, shipped
    from qsam2.recipe.section import did_you_mean

    if options.overrides:
        raise UserError(f"{options.overrides[0]} does nothing here: files are shown as they are")
    files = {kind: shipped(kind) for kind in FOLDERS}
    if options.name is None:
        sections = []
        for kind, named in files.items():
            titles = {name: path.read_text().partition("\n")[0].lstrip("# ") for name, path in named.items()}
            rows = [[f"  {name}", title] for name, title in titles.items()]
            sections.append(f"{kind}s\n{aligned(rows)}")
        print("\n\n".join(sections))
        return
    every = {name: path for named in files.values() for name, path in named.items()}
    if options.name not in every:
        hint = did_you_mean(options.name, every)
        raise UserError(f"{options.name} does not ship with qsam2; qsam2 recipes lists what does{hint}")
    print(every[options.name].read_text(), end="")
