"""The command line: `qsam2 train`, `qsam2 evaluate`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from qsam2 import __version__
from qsam2.errors import UserError

log = logging.getLogger("qsam2")

TRAIN_EPILOG = """examples:
  qsam2 train recipes/demo.yaml
  qsam2 train recipes/qat_w4a4.yaml data.train=davis data.root=/data/DAVIS trainer.max_steps=2000
  qsam2 train recipes/qat_w4a4.yaml debug=fast

Every key of a recipe can be set as key=value with dots; qsam2/recipe/ documents them. The same command resumes a run
that was stopped. debug=fast runs two steps of everything, debug=overfit one clip, debug=profile shows the time."""

EVALUATE_EPILOG = """examples:
  qsam2 evaluate runs/qat-w4a4 --data davis:/data/DAVIS:val --json scores.json
  qsam2 evaluate nano --data moving_objects:20:test --reference nano
  qsam2 evaluate tiny --data coco:/data/coco model.checkpoint=sam2.1_hiera_tiny.pt
  qsam2 evaluate --pred masks/ --gt /data/DAVIS/Annotations/480p --protocol davis

MODEL is a run folder, a model.safetensors of qsam2, a checkpoint, or a size (nano, tiny, small, base_plus, large).
Videos give J&F of semi-supervised tracking, stills the mask IoU of point and box prompts; all scores in percent."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="qsam2", description="Quantization of Segment Anything Model 2.")
    parser.add_argument("--version", action="version", version=f"qsam2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", **_texts("carry out a recipe: quantize, train, score", TRAIN_EPILOG)))
    _add_evaluate(commands.add_parser("evaluate", **_texts("score a model or masks on disk", EVALUATE_EPILOG)))
    given, rest = parser.parse_known_args(arguments)
    if strange := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unknown argument {strange[0]!r}; see qsam2 {given.command} --help")
    given.overrides = rest
    return run_safely(lambda: given.run(given))


def run_safely(command: Callable[[], None]) -> int:
    """Run a command with the log on stderr, and turn a user's mistake into one line and exit status 2."""
    _quiet_logs()
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, as in recipes/")
    parser.set_defaults(run=_train)


def _train(given: argparse.Namespace) -> None:
    from qsam2.pipeline import run  # imports torch: --help should not wait for it
    from qsam2.recipe import load_recipe
    from qsam2.report.table import results_table

    recipe = load_recipe(given.recipe, given.overrides)
    metrics = run(recipe)
    print(results_table(metrics))
    print(f"{recipe.run_folder / 'report.html'}")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder, file or size")
    parser.add_argument("--data", metavar="KIND:ROOT:SPLIT", help="what to score on; default: the recipe's data.val")
    parser.add_argument("--protocol", choices=("davis", "sav"), help="default: the recipe's, davis without one")
    parser.add_argument("--frames", type=int, metavar="N", help="the first N frames of each video")
    parser.add_argument("--videos", type=int, metavar="N", help="the first N videos")
    parser.add_argument("--reference", metavar="MODEL", help="compare with this model: fidelity, difference in J&F")
    parser.add_argument("--pred", type=Path, metavar="DIR", help="score these masks instead of a model")
    parser.add_argument("--gt", type=Path, metavar="DIR", help="true masks for --pred")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores there")
    parser.set_defaults(run=_evaluate)


def _evaluate(given: argparse.Namespace) -> None:
    from qsam2.evaluate import evaluate_model
    from qsam2.metrics.folders import score_folders
    from qsam2.report.table import score_line
    from qsam2.run_folder import write_text

    if given.pred or given.gt:
        if given.model or not (given.pred and given.gt):
            raise UserError("--pred DIR and --gt DIR go together, without a MODEL")
        block = score_folders(given.pred, given.gt, given.protocol or "davis")
        block |= {"seconds_per_frame": None, "model": str(given.pred), "fidelity": None}
    elif given.model:
        flags = {"data.val": given.data, "evaluate.protocol": given.protocol}
        flags |= {"evaluate.frames": given.frames, "evaluate.videos": given.videos}
        overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
        block = evaluate_model(given.model, [*given.overrides, *overrides], reference=given.reference)
    else:
        raise UserError("nothing to score: give a MODEL (run folder, file or size), or --pred DIR --gt DIR")
    print(score_line(block))
    if given.json:
        write_text(given.json, json.dumps(block, indent=1))


def _texts(summary: str, epilog: str) -> dict[str, object]:
    return {
        "help": summary,
        "description": summary[0].upper() + summary[1:] + ".",
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _quiet_logs() -> None:
    import lightning.pytorch  # noqa: F401  (sets its loggers up, so they are quieted after it)

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|training|sam2|tensordict|albumentations)(\..*)?")


if __name__ == "__main__":
    sys.exit(main())
