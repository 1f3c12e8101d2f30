"""The command line: `qsam2 train`, `qsam2 evaluate`, `qsam2 table`, `qsam2 benchmark`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
  qsam2 evaluate runs/qat-w4a4 --reference runs/qat-w4a4 memory.cache=true memory.sharing=adaptive memory.frames=3
  qsam2 evaluate --pred masks/ --gt /data/DAVIS/Annotations/480p --protocol davis

MODEL is a run folder, a model.safetensors of qsam2, a checkpoint, or a size (nano, nano_heavy, tiny, small, base_plus,
large).
Videos give J&F of semi-supervised tracking, stills the mask IoU of point and box prompts; all scores in percent."""

TABLE_EPILOG = """examples:
  qsam2 table recipes/tables/qat.yaml --dry-run
  qsam2 table recipes/tables/qat.yaml --jobs 2 --write README.md
  qsam2 table recipes/tables/qat.yaml --output runs/tables/long trainer.max_steps=2000

Each run is a process of its own, with its log in its folder. The same command goes on where it was stopped: finished
runs are not repeated, one that was cut off resumes, a failed one is marked in the table and tried again. --write puts
the table between <!-- table:NAME --> and <!-- /table:NAME -->, its figures into docs/tables/NAME.json beside."""

QUANTIZERS_EPILOG = """examples:
  qsam2 benchmark quantizers --json quantizers.json
  qsam2 benchmark quantizers --size nano --image-size 256 --peers plain_lsq aten

Fake-quantizes one weight and one activation, then takes whole training steps of SAM 2 at W4A4, ours and the peers' in
turn, on the CPU. Peers: plain_lsq, aten (both come with PyTorch), brevitas, torchao (pip install -e ".[peers]")."""

MEMORY_EPILOG = """examples:
  qsam2 benchmark memory --json memory.json
  qsam2 benchmark memory --size nano --objects 2 --precision bf16-mixed --device cuda

Tracks noise with random weights behind a full memory bank, a frame each in turn: sam2 as it is, a bounded state, the
cache of keys and values, adaptive sharing at 2, 3 and 4 frames, and at 3 frames what it is measured against."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
    message, status = "", 0
    try:
        given = _parse(sys.argv[1:] if arguments is None else arguments)
        given.run(given)
    except UserError as error:
        message, status = f"error: {error}", 2
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from the last checkpoint", 130
    if message:  # only here have the frames that were left let go of their progress bars, which end their line then
        print(message, file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that they look like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="qsam2", description="Quantization of Segment Anything Model 2.")
    parser.add_argument("--version", action="version", version=f"qsam2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", **_texts("carry out a recipe: quantize, train, score", TRAIN_EPILOG)))
    _add_evaluate(commands.add_parser("evaluate", **_texts("score a model or masks on disk", EVALUATE_EPILOG)))
    _add_table(commands.add_parser("table", **_texts("carry out the runs of a table and write it", TABLE_EPILOG)))
    _add_benchmark(commands.add_parser("benchmark", help="measure speed and memory beside other libraries"))
    before = ["", *arguments]
    overrides = [word for flag, word in zip(before, arguments, strict=False) if _is_override(word, flag)]
    others = [word for flag, word in zip(before, arguments, strict=False) if not _is_override(word, flag)]
    given, unknown = parser.parse_known_args(others)
    if unknown:
        raise UserError(
            f"unknown argument {unknown[0]!r}: a key of the recipe is written key=value, without dashes; "
            f"flags are in qsam2 {given.command} --help"
        )
    given.overrides = overrides
    return given


def _is_override(word: str, before: str) -> bool:
    key, equals, _ = word.partition("=")  # a path with = in it has a slash, or belongs to the flag before it
    is_value = before.startswith("--") and "=" not in before
    return bool(equals) and "/" not in key and not key.startswith("-") and not is_value


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] RECIPE [key=value ...]"
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, as in recipes/")
    parser.set_defaults(run=_train)


def _train(given: argparse.Namespace) -> None:
    from qsam2.recipe import load_recipe

    recipe = load_recipe(given.recipe, given.overrides)
    _quiet_logs()
    from qsam2.pipeline import run  # imports torch: a mistake in the recipe should not wait for it
    from qsam2.report.table import results_table
    from qsam2.run_folder import is_first_rank

    metrics = run(recipe)
    if is_first_rank():
        print(results_table(metrics))
        print(recipe.run_folder / "report.html")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.usage = """%(prog)s [-h] MODEL [--data KIND:ROOT:SPLIT] [--reference MODEL] [options] [key=value ...]
       %(prog)s [-h] --pred DIR --gt DIR [--protocol {davis,sav}] [--json OUT]"""
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
    from qsam2.report.table import score_line

    if given.json:
        _make_room(given.json)
    block = _score_masks(given) if given.pred or given.gt else _score_model(given)
    print(score_line(block))
    if given.json:
        from qsam2.run_folder import write_text

        write_text(given.json, json.dumps(block, indent=1))


def _score_masks(given: argparse.Namespace) -> dict[str, Any]:
    if given.model or not (given.pred and given.gt):
        raise UserError("--pred DIR and --gt DIR go together, without a MODEL")
    flags = [f"--{flag}" for flag in ("data", "frames", "videos", "reference") if getattr(given, flag) is not None]
    if idle := [*flags, *given.overrides]:
        raise UserError(f"{idle[0]} does nothing with --pred and --gt, which are scored as they are: leave it out")
    _quiet_logs()
    from qsam2.metrics.folders import score_folders

    block = score_folders(given.pred, given.gt, given.protocol or "davis")
    return block | {"seconds_per_frame": None, "model": str(given.pred), "fidelity": None}


def _score_model(given: argparse.Namespace) -> dict[str, Any]:
    if not given.model:
        raise UserError("nothing to score: give a MODEL (run folder, file or size), or --pred DIR --gt DIR")
    values = {"data.val": given.data, "evaluate.protocol": given.protocol}
    values |= {"evaluate.frames": given.frames, "evaluate.videos": given.videos}
    overrides = [f"{key}={value}" for key, value in values.items() if value is not None]
    _quiet_logs()
    from qsam2.evaluate import evaluate_model

    return evaluate_model(given.model, [*given.overrides, *overrides], reference=given.reference)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.usage = """%(prog)s [-h] TABLE [--output DIR] [--jobs N] [--write DOCUMENT] [--render] [key=value ...]
       %(prog)s [-h] TABLE [--output DIR] {--dry-run,--only RUN} [key=value ...]"""
    parser.add_argument("table", type=Path, metavar="TABLE", help="a YAML file, as in recipes/tables/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/tables/NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table into this Markdown file")
    parser.add_argument("--render", action="store_true", help="write what is finished, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time")
    parser.add_argument("--only", metavar="RUN", help="carry out this one run, in this process")
    parser.set_defaults(run=_table)


def _table(given: argparse.Namespace) -> None:
    from qsam2.tables.definition import float_runs, load_table, table_runs

    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: give at least 1")
    table = load_table(given.table)
    output = given.output or Path("runs", "tables", table.name)
    runs = table_runs(table, output, given.overrides)
    _quiet_logs()
    from qsam2.tables.scores import carry_out

    if given.only:
        named = {run.name: run for run in [*float_runs(runs), *runs]}
        if given.only not in named:
            raise UserError(f"--only {given.only}: no such run; --dry-run lists them")
        carry_out(table, named[given.only])
        return
    from qsam2.tables.markdown import extract, insert, render
    from qsam2.tables.results import collect
    from qsam2.tables.schedule import list_runs, run_table

    if given.dry_run:
        print(list_runs(table, runs, given.jobs))
        return
    if given.write:
        extract(given.write, table.name)  # a document without the markers shows before the work
    name = os.path.relpath(given.table)
    if not given.render:
        command = ["table", str(given.table), "--output", str(output), *given.overrides]
        run_table(table, runs, command=command, jobs=given.jobs)
    jobs = ["--jobs", str(given.jobs)] if given.jobs > 1 else []
    write = ["--write", given.write.name] if given.write else []
    results = collect(table, runs, shlex.join(["qsam2", "table", name, *jobs, *write, *given.overrides]))
    text = render(results)
    from qsam2.run_folder import write_text

    write_text(output / "table.json", json.dumps(results, indent=1))
    write_text(output / "table.md", text)
    if given.write:
        write_text(given.write.parent / "docs" / "tables" / f"{table.name}.json", json.dumps(results, indent=1) + "\n")
        insert(given.write, table.name, text)
    print(text)


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure speed and memory beside other libraries."
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    texts = _texts("what fake quantization costs", QUANTIZERS_EPILOG)
    quantizers = kinds.add_parser("quantizers", **texts)
    quantizers.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    quantizers.add_argument("--size", default="tiny", help="the model (default: tiny)")
    quantizers.add_argument("--image-size", type=int, default=512, metavar="PX", help="default: 512")
    quantizers.add_argument("--frames", type=int, default=4, metavar="N", help="of the clip (default: 4)")
    quantizers.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds of steps (default: 7)")
    quantizers.add_argument("--peers", nargs="*", metavar="NAME", help="whom to measure beside qsam2; default: all")
    quantizers.set_defaults(run=_benchmark_quantizers)
    memory = kinds.add_parser("memory", **_texts("what remembered frames cost while tracking", MEMORY_EPILOG))
    memory.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    memory.add_argument("--size", default="tiny", help="the model (default: tiny)")
    memory.add_argument("--image-size", type=int, metavar="PX", help="default: the size's own")
    memory.add_argument("--objects", type=int, default=1, metavar="N", help="default: 1")
    memory.add_argument("--frames", type=int, default=8, metavar="N", help="before those measured (default: 8)")
    memory.add_argument("--repeats", type=int, default=5, metavar="N", help="frames measured (default: 5)")
    memory.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default: 32-true)")
    memory.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    memory.set_defaults(run=_benchmark_memory)


def _benchmark_quantizers(given: argparse.Namespace) -> None:
    _prepare_benchmark(given)
    from qsam2.benchmarks.peers import PEERS
    from qsam2.benchmarks.quantizers import benchmark_quantizers, markdown_table

    result = benchmark_quantizers(
        size=given.size,
        image_size=given.image_size,
        frames=given.frames,
        repeats=given.repeats,
        peers=list(PEERS) if given.peers is None else given.peers,
    )
    _show_benchmark(given, markdown_table(result), result)


def _benchmark_memory(given: argparse.Namespace) -> None:
    _prepare_benchmark(given)
    from qsam2.benchmarks.memory import benchmark_memory, markdown_table

    flags = ("size", "image_size", "objects", "frames", "repeats", "precision", "device")
    result = benchmark_memory(**{flag: getattr(given, flag) for flag in flags})
    _show_benchmark(given, markdown_table(result), result)


def _prepare_benchmark(given: argparse.Namespace) -> None:
    if given.overrides:
        raise UserError(f"{given.overrides[0]!r} is a key of a recipe, and this benchmark reads none: leave it out")
    if given.json:
        _make_room(given.json)
    _quiet_logs()


def _show_benchmark(given: argparse.Namespace, table: str, result: Mapping[str, Any]) -> None:
    print(table)
    if given.json:
        from qsam2.run_folder import write_text

        write_text(given.json, json.dumps(result, indent=1))


def _make_room(file: Path) -> None:
    """Make the folder of an output before the work, so that a wrong path is not found after it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {file}: its folder cannot be made ({error.strerror}); give another path") from error
    if file.is_dir():
        raise UserError(f"--json {file}: is a folder; give the path of a file")


def _texts(summary: str, epilog: str) -> dict[str, Any]:
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
    warnings.filterwarnings(
        "ignore", module=r"(lightning|torch|training|sam2|tensordict|albumentations|brevitas|torchao)(\..*)?"
    )


if __name__ == "__main__":
    sys.exit(main())
