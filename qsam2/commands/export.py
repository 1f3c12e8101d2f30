"""`qsam2 export`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from qsam2.commands.common import Commands, log, quiet_logs, texts
from qsam2.errors import UserError
from qsam2.output import write_whole

EPILOG = """examples:
  qsam2 export runs/qat-w4a4 --format onnx --out exported/qat-w4a4
  qsam2 export runs/qat-w4a4 --format packed --out exported/qat-w4a4
  qsam2 export nano --format onnx --out exported/nano model.image_size=256

MODEL is a run folder, a model.safetensors of qsam2, a checkpoint, or a size. onnx writes five graphs and model.json
(docs/onnx.md), of float models too; packed writes the file that qsam2 loads, with its card."""


def add_export(commands: Commands) -> None:
    """The parser of `qsam2 export`."""
    parser = commands.add_parser("export", **texts("write a model for other runtimes", EPILOG))
    parser.usage = "%(prog)s [-h] MODEL --format {onnx,packed} --out DIR [key=value ...]"
    parser.add_argument("model", metavar="MODEL", help="run folder, file or size")
    parser.add_argument("--format", choices=("onnx", "packed"), required=True, help="what to write")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the files, made if missing")
    parser.set_defaults(run=_export)


def _export(given: argparse.Namespace) -> None:
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out}: is a file; give a folder")
    quiet_logs()
    sizes = _export_onnx(given) if given.format == "onnx" else _export_packed(given)
    for name, size in sizes.items():
        print(f"{given.out / name}  {size:,} bytes")


def _export_onnx(given: argparse.Namespace) -> dict[str, int]:
    from qsam2.formats.onnx.write import export_onnx, require_packages
    from qsam2.loading import load_model

    require_packages()  # before the model is loaded
    model, recipe = load_model(given.model, given.overrides)
    if recipe.memory.reads_anew:
        log.warning("the graphs read all of the memory, as sam2 does: memory.* of the recipe is not exported")
    return export_onnx(model, recipe.model_dump(mode="json"), given.out, card=_card(given.model))


def _export_packed(given: argparse.Namespace) -> dict[str, int]:
    from qsam2.formats.packed import read_header
    from qsam2.loading import load_model

    if given.overrides:
        raise UserError(f"{given.overrides[0]!r} changes nothing in a packed file, which is copied: leave it out")
    source = Path(given.model)
    folder = source if source.is_dir() else source.parent
    file = source / "model.safetensors" if source.is_dir() else source
    if source.is_dir() and not file.is_file():
        raise UserError(f"{source} holds no model.safetensors: the run is not finished; run its recipe again")
    read_header(file)
    load_model(file)  # what is damaged is not handed on
    cards = [folder / name for name in ("card.md", "card.json") if (folder / name).is_file()]
    return {each.name: _copy(each, given.out / each.name) for each in (file, *cards)}


def _copy(source: Path, target: Path) -> int:
    """Copy a file whole or not at all; returns its size in bytes."""
    write_whole(target, lambda path: shutil.copyfile(source, path))
    return target.stat().st_size


def _card(model: str) -> dict[str, Any] | None:
    file = Path(model) / "card.json"
    return json.loads(file.read_text()) if file.is_file() else None
