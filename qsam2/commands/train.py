"""`qsam2 train`."""

from __future__ import annotations

import argparse
import os

from qsam2.commands.common import RESUMES, Commands, add_parser, quiet_logs

EPILOG = """examples:
  qsam2 train demo
  qsam2 train qat_w4a4 data.train=davis data.root=/data/DAVIS trainer.max_steps=2000
  qsam2 train recipes/qat_w4a4.yaml debug=fast
  qsam2 train ptq_w4a4 --dry-run

Every key of a recipe can be set as key=value with dots; key={} resets a section to its defaults, key=null leaves it
out. The same command resumes a run that was stopped.
debug=fast runs two steps of everything, debug=overfit one clip, debug=profile shows the time."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 train`."""
    summary, usage = "carry out a recipe: quantize, train, score", "%(prog)s [-h] RECIPE [--dry-run] [key=value ...]"
    parser = add_parser(commands, "train", _train, summary, EPILOG, usage, resumes=RESUMES)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that qsam2 recipes lists")
    parser.add_argument("--dry-run", action="store_true", help="show keys, layers and bits, and an estimate of time")


def _train(options: argparse.Namespace) -> None:
    from qsam2.recipe import load_recipe

    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    own = [f"output=runs/sweeps/{sweep}/{run}"] if sweep and run else []  # an agent of Weights & Biases started it
    recipe = load_recipe(options.recipe, [*own, *options.overrides])
    quiet_logs(options)
    if options.dry_run:
        from qsam2.report.plan import plan

        print(plan(recipe))
        return
    from qsam2.pipeline import carry_out  # imports torch: a mistake in the recipe should not wait for it
    from qsam2.report.page import results_table
    from qsam2.run import is_first_rank

    metrics = carry_out(recipe)
    if is_first_rank():
        print(results_table(metrics))
        print(recipe.run_folder / "report.html")
