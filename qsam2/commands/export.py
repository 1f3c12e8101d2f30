"""`qsam2 export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsam2.commands.common import Commands, add_parser, quiet_logs

EPILOG = """examples:
  qsam2 export runs/qat-w4a4 --format onnx --out exported/qat-w4a4
  qsam2 export runs/qat-w4a4 --format packed --out exported/qat-w4a4
  qsam2 export nano --format onnx --out exported/nano model.image_size=256

MODEL is a run folder, a model.safetensors of qsam2, a checkpoint, or a size. onnx writes five graphs and model.json
(docs/onnx.md), of float models too; packed writes the file that qsam2 loads, with its card."""


def add(commands: Commands) -> None:
    """The parser of `qsam2 export`."""
    usage = "%(prog)s [-h] MODEL --format {onnx,packed} --out DIR [key=value ...]"
    parser = add_parser(commands, "export", _export, "write a model for other runtimes", EPILOG, usage)
    parser.add_argument("model", metavar="MODEL", help="run folder, file or size")
    parser.add_argument("--format", choices=("onnx", "packed"), required=True, help="what to write")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the files, made if missing")


def _export(options: argparse.Namespace) -> None:
    quiet_logs(options)
    from qsam2.api import export

    for file, size in export(options.model, options.format, options.out, overrides=options.overrides).items():
        print(f"{file}  {size:,} bytes")
