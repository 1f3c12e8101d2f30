"""`qsam2 sensitivity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsam2.commands.common import Commands, add_parser, check_positive, make_room, quiet_logs
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 sensitivity nano --json sensitivity.json
  qsam2 sensitivity runs/ptq-w4a4 --bits 2 3 4
  qsam2 sensitivity tiny --data davis:/data/DAVIS:train --videos 4 --frames 8
  qsam2 train recipes/qat_mixed.yaml quantize.allocate.sensitivity=sensitivity.json

The weights of one group of layers (a block of the trunk, a layer of the memory attention, ...) are quantized at a time,
then its activations if the recipe quantizes these, and videos are tracked. The loss is 100 - fidelity, in percent of
mask IoU with the float model. It is measured on training videos, so that bits are not chosen on the data of the scores.
The same command goes on where it was stopped. MODEL is a run folder (its quantizers are used with the float model that
it started from, and the result is written into it), a checkpoint or a size."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 sensitivity`."""
    usage = "%(prog)s [-h] MODEL [--bits B ...] [--data KIND:ROOT:SPLIT] [options] [key=value ...]"
    parser = add_parser(commands, "sensitivity", _sensitivity, "rank groups of layers by their loss", EPILOG, usage)
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint or size")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4], metavar="B", help="weight bits (default: 2 4)")
    parser.add_argument("--data", metavar="KIND:ROOT:SPLIT", help="default: train split of the recipe's first source")
    parser.add_argument("--videos", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="frames per video (default: 16)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="default: sensitivity.json, for a run in its folder")


def _sensitivity(options: argparse.Namespace) -> None:
    if wrong := [bits for bits in options.bits if not 2 <= bits <= 8]:
        raise UserError(f"--bits {wrong[0]}: give numbers from 2 to 8")
    check_positive(options, "videos", "frames")
    folder = Path(options.model) if Path(options.model).is_dir() else Path()
    output = options.json or folder / "sensitivity.json"
    make_room(output)
    quiet_logs()
    from qsam2.run import is_first_rank
    from qsam2.sweep.sensitivity import measure_sensitivity, ranking

    chosen = {flag: getattr(options, flag) for flag in ("bits", "data", "videos", "frames")}
    result = measure_sensitivity(options.model, options.overrides, **chosen, output=output)
    if is_first_rank():
        print(ranking(result))
        print(output)
