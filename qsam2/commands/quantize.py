"""`qsam2 quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsam2.commands.common import RESUMES, Commands, add_parser, check_model, quiet_logs

EPILOG = """examples:
  qsam2 quantize nano --bits 8 --data pictures/
  qsam2 quantize sam2.1_hiera_tiny.pt --bits w4a8 --data film.mp4 --out runs/tiny-w4a8
  qsam2 quantize nano --recipe recipes/qat_w4a4.yaml --data davis:/data/DAVIS trainer.max_steps=2000

CHECKPOINT is a float model: a file, whose size is found by its shapes, or a size. DATA is a source KIND:ROOT:SPLIT, or
simply a folder or file: pictures, videos, or DAVIS. Pictures and videos need no masks: the float model's own masks
prompt them, and fidelity to the float model is the score. Of these every fifth picture, or piece of a video, is held
out to be scored. Without --data videos are generated. Without --recipe ranges of least error are calibrated, nothing
is trained."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 quantize`."""
    summary = "quantize a model on your data, without writing a recipe"
    usage = "%(prog)s [-h] CHECKPOINT [--bits BITS] [--recipe RECIPE] [--data DATA] [options] [key=value ...]"
    parser = add_parser(commands, "quantize", _quantize, summary, EPILOG, usage, resumes=RESUMES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="float model: file or size")
    parser.add_argument("--bits", metavar="BITS", help="8, w4a8, or w4 (weights alone); default: 8, or the recipe's")
    parser.add_argument("--recipe", type=Path, metavar="RECIPE", help="a file, or a name that qsam2 recipes lists")
    parser.add_argument("--data", metavar="DATA", help="folder, file or KIND:ROOT:SPLIT")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/SIZE-BITS)")


def _quantize(options: argparse.Namespace) -> None:
    from qsam2.recipe.quantize import parse_bits

    check_model(options.checkpoint)  # torch is imported after what can be checked without it
    if options.bits is not None:
        parse_bits(options.bits)
    if options.data is not None and ":" not in options.data and not Path(options.data).expanduser().exists():
        from qsam2.data.sources import source_of

        source_of(options.data)
    quiet_logs(options)
    from qsam2.api import quantize
    from qsam2.recipe import save_recipe
    from qsam2.report.page import results_table
    from qsam2.run import is_first_rank

    chosen = {flag: getattr(options, flag) for flag in ("recipe", "data", "bits", "out", "overrides")}
    result = quantize(options.checkpoint, **chosen)
    if is_first_rank():
        print(save_recipe(result.recipe))
        print(f"recipe: {result.folder / 'recipe.yaml'}")
        print(results_table(result.metrics))
        print(f"{result.file}  {result.file.stat().st_size:,} bytes")
        print(result.folder / "report.html")
