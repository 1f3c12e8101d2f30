"""`qsam2 recipes`."""

from __future__ import annotations

import argparse

from qsam2.commands.common import Commands, texts
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 recipes
  qsam2 recipes qat_w4a4 > my_recipe.yaml
  qsam2 train qat_w4a4 model.size=tiny data.train=davis data.root=/data/DAVIS

The names work from any folder: recipes for qsam2 train, sweeps for qsam2 sweep, tables for qsam2 table. A recipe of
your own may lie over one of them: base: qat_w4a4."""


def add_recipes(commands: Commands) -> None:
    """The parser of `qsam2 recipes`."""
    parser = commands.add_parser(
        "recipes", **texts("list the shipped recipes, sweeps and tables, or print one", EPILOG)
    )
    parser.usage = "%(prog)s [-h] [NAME]"
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this file")
    parser.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> None:
    from qsam2.output import aligned
    from qsam2.recipe.section import did_you_mean
    from qsam2.recipe.shipped import PATTERNS, shipped

    if options.overrides:
        raise UserError(f"{options.overrides[0]} does nothing here: files are shown as they are")
    files = {kind: shipped(kind) for kind in PATTERNS}
    if options.name is None:
        sections = []
        for kind, named in files.items():
            rows = [[f"  {name}", _title(path.read_text())] for name, path in named.items()]
            sections.append(f"{kind}s\n{aligned(rows)}")
        print("\n\n".join(sections))
        return
    every = {name: path for named in files.values() for name, path in named.items()}
    if options.name not in every:
        raise UserError(
            f"{options.name} does not ship with qsam2; qsam2 recipes lists what does{did_you_mean(options.name, every)}"
        )
    print(every[options.name].read_text(), end="")


def _title(text: str) -> str:
    """The first line of a file's comment."""
    return text.partition("\n")[0].lstrip("# ")
