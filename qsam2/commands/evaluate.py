"""`qsam2 evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qsam2.commands.common import Commands, add_parser, make_room, quiet_logs, write_json
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 evaluate runs/qat-w4a4 --data davis:/data/DAVIS:val --json scores.json
  qsam2 evaluate nano --data moving_objects:20:test --reference nano
  qsam2 evaluate tiny --data coco:/data/coco model.checkpoint=sam2.1_hiera_tiny.pt
  qsam2 evaluate runs/qat-w4a4 --reference runs/qat-w4a4 memory.cache=true memory.sharing=adaptive memory.frames=3
  qsam2 evaluate runs/w8a8 --data film.mp4 --reference nano
  qsam2 evaluate nano --data davis:/data/DAVIS:val --save-masks masks/
  qsam2 evaluate --pred masks/ --gt /data/DAVIS/Annotations/480p --protocol davis

MODEL is a run folder, a model.safetensors of qsam2, a checkpoint, or a size (nano, nano_heavy, nano_tails, tiny,
small, base_plus, large).
Videos give J&F of semi-supervised tracking, stills the mask IoU of point and box prompts; all scores in percent.
Pictures and videos without masks (--data with a folder or file of them) give fidelity to the float --reference."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 evaluate`."""
    usage = """%(prog)s [-h] MODEL [--data KIND:ROOT:SPLIT] [--reference MODEL] [options] [key=value ...]
       %(prog)s [-h] --pred DIR --gt DIR [--protocol {davis,sav}] [--json OUT]"""
    parser = add_parser(commands, "evaluate", _evaluate, "score a model or masks on disk", EPILOG, usage)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder, file or size")
    parser.add_argument("--data", metavar="DATA", help="KIND:ROOT:SPLIT, folder or file; default: as the recipe says")
    parser.add_argument("--protocol", choices=("davis", "sav"), help="default: the recipe's, davis without one")
    parser.add_argument("--frames", type=int, metavar="N", help="the first N frames of each video")
    parser.add_argument("--videos", type=int, metavar="N", help="the first N videos")
    parser.add_argument("--reference", metavar="MODEL", help="compare with this model: fidelity, difference in J&F")
    parser.add_argument("--pred", type=Path, metavar="DIR", help="score these masks instead of a model")
    parser.add_argument("--gt", type=Path, metavar="DIR", help="true masks for --pred")
    parser.add_argument("--save-masks", type=Path, metavar="DIR", help="write tracked masks as benchmarks take them")
    parser.add_argument("--fast", action="store_true", help="score the model as `qsam2 predict --fast` runs it")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores there")


def _evaluate(options: argparse.Namespace) -> None:
    from qsam2.evaluation.scoring import difference_lines, headline
    from qsam2.run import is_first_rank

    make_room(options.json)
    block = _score_masks(options) if options.pred or options.gt else _score_model(options)
    if is_first_rank():  # one rank writes and prints for all
        write_json(options.json, block)
        print("\n".join([f"{block['model']}: {headline(block)}", *difference_lines(block)]))


def _score_masks(options: argparse.Namespace) -> dict[str, Any]:
    if options.model or not (options.pred and options.gt):
        raise UserError("--pred DIR and --gt DIR go together, without a MODEL")
    names = ("data", "frames", "videos", "reference", "save_masks")
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    flags += ["--fast"] * options.fast
    if idle := [*flags, *options.overrides]:
        raise UserError(f"{idle[0]} does nothing with --pred and --gt, which are scored as they are: leave it out")
    quiet_logs(options)
    from qsam2.evaluation.mask_files import score_folders

    block = score_folders(options.pred, options.gt, options.protocol or "davis")
    return block | {"seconds_per_frame": None, "model": str(options.pred), "fidelity": None}


def _score_model(options: argparse.Namespace) -> dict[str, Any]:
    if not options.model:
        raise UserError("nothing to score: give a MODEL (run folder, file or size), or --pred DIR --gt DIR")
    quiet_logs(options)
    from qsam2.api import evaluate

    flags = ("data", "reference", "protocol", "frames", "videos", "fast", "save_masks", "overrides")
    return evaluate(options.model, **{flag: getattr(options, flag) for flag in flags})
