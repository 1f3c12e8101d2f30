"""`qsam2 benchmark`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsam2.commands.common import Commands, make_room, quiet_logs, texts
from qsam2.errors import UserError

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


TRACKING_EPILOG = """examples:
  qsam2 benchmark tracking --json tracking.json
  qsam2 benchmark tracking --size nano --repeats 7 --engines sam2 "sam2 bf16" qsam2

Tracks noise with random weights behind a full memory bank on the CPU, a frame each in turn, one object: sam2 as it is,
with bf16 autocast and compiled; our exported float graphs in ONNX Runtime, in its own int8 and in OpenVINO's (pip
install openvino nncf); qsam2's fast path with keys shared at 3 frames, and exact. Engines whose packages are missing
are left out, and the table says so."""


def add_benchmark(commands: Commands) -> None:
    """The parser of `qsam2 benchmark`."""
    parser = commands.add_parser("benchmark", help="measure speed and memory beside other libraries")
    parser.description = "Measure speed and memory beside other libraries."
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    quantizers = kinds.add_parser("quantizers", **texts("what fake quantization costs", QUANTIZERS_EPILOG))
    quantizers.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    quantizers.add_argument("--size", default="tiny", help="the model (default: tiny)")
    quantizers.add_argument("--image-size", type=int, default=512, metavar="PX", help="default: 512")
    quantizers.add_argument("--frames", type=int, default=4, metavar="N", help="of the clip (default: 4)")
    quantizers.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds of steps (default: 7)")
    choices, said = ("auto", "on", "off"), "our kernels, as trainer.compile (default: auto)"
    quantizers.add_argument("--compile", choices=choices, default="auto", help=said)
    quantizers.add_argument("--peers", nargs="*", metavar="NAME", help="whom to measure beside qsam2; default: all")
    quantizers.set_defaults(run=_benchmark_quantizers)
    memory = kinds.add_parser("memory", **texts("what remembered frames cost while tracking", MEMORY_EPILOG))
    memory.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    memory.add_argument("--size", default="tiny", help="the model (default: tiny)")
    memory.add_argument("--image-size", type=int, metavar="PX", help="default: the size's own")
    memory.add_argument("--objects", type=int, default=1, metavar="N", help="default: 1")
    memory.add_argument("--frames", type=int, default=8, metavar="N", help="before those measured (default: 8)")
    memory.add_argument("--repeats", type=int, default=5, metavar="N", help="frames measured (default: 5)")
    memory.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default: 32-true)")
    memory.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    memory.set_defaults(run=_benchmark_memory)
    tracking = kinds.add_parser("tracking", **texts("what a tracked frame costs end to end", TRACKING_EPILOG))
    tracking.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    tracking.add_argument("--size", default="tiny", help="the model (default: tiny)")
    tracking.add_argument("--image-size", type=int, metavar="PX", help="default: the size's own")
    tracking.add_argument("--repeats", type=int, default=5, metavar="N", help="frames measured (default: 5)")
    tracking.add_argument("--engines", nargs="+", metavar="NAME", help="what to measure; default: all")
    tracking.set_defaults(run=_benchmark_tracking)


def _benchmark_quantizers(options: argparse.Namespace) -> None:
    _prepare_benchmark(options)
    from qsam2.benchmark.peers import PEERS
    from qsam2.benchmark.quantization import benchmark_quantizers, markdown_table

    result = benchmark_quantizers(
        size=options.size,
        image_size=options.image_size,
        frames=options.frames,
        repeats=options.repeats,
        compile=options.compile,
        peers=list(PEERS) if options.peers is None else options.peers,
    )
    _show_benchmark(options, markdown_table(result), result)


def _benchmark_memory(options: argparse.Namespace) -> None:
    _prepare_benchmark(options)
    from qsam2.benchmark.remembered_frames import benchmark_memory, markdown_table

    flags = ("size", "image_size", "objects", "frames", "repeats", "precision", "device")
    result = benchmark_memory(**{flag: getattr(options, flag) for flag in flags})
    _show_benchmark(options, markdown_table(result), result)


def _benchmark_tracking(options: argparse.Namespace) -> None:
    _prepare_benchmark(options)
    from qsam2.benchmark.tracked_frame import benchmark_tracking, markdown_table

    result = benchmark_tracking(
        size=options.size, image_size=options.image_size, repeats=options.repeats, engines=options.engines
    )
    _show_benchmark(options, markdown_table(result), result)


def _prepare_benchmark(options: argparse.Namespace) -> None:
    if options.overrides:
        raise UserError(f"{options.overrides[0]!r} is a key of a recipe, and this benchmark reads none: leave it out")
    if options.json:
        make_room(options.json)
    quiet_logs()


def _show_benchmark(options: argparse.Namespace, table: str, result: Mapping[str, Any]) -> None:
    print(table)
    if options.json:
        from qsam2.output import write_text

        write_text(options.json, json.dumps(result, indent=1))
