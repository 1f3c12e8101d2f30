"""`qsam2 benchmark`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsam2.commands.common import Commands, add_parser, make_room, quiet_logs, write_json
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

OF_ALL_COMMANDS = {"command", "benchmark", "run", "json", "overrides", "quiet", "verbose", "resumes"}


def add(commands: Commands) -> None:
    """The parser of `qsam2 benchmark`."""
    parser = commands.add_parser("benchmark", help="measure speed and memory beside other libraries")
    parser.description = "Measure speed and memory beside other libraries."
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    quantizers = _add(kinds, "quantizers", "what fake quantization costs", QUANTIZERS_EPILOG)
    quantizers.add_argument("--image-size", type=int, default=512, metavar="PX", help="default: 512")
    quantizers.add_argument("--frames", type=int, default=4, metavar="N", help="of the clip (default: 4)")
    quantizers.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds of steps (default: 7)")
    choices, said = ("auto", "on", "off"), "our kernels, as trainer.compile (default: auto)"
    quantizers.add_argument("--compile", choices=choices, default="auto", help=said)
    quantizers.add_argument("--peers", nargs="*", metavar="NAME", help="whom to measure beside qsam2; default: all")
    memory = _add(kinds, "memory", "what remembered frames cost while tracking", MEMORY_EPILOG)
    memory.add_argument("--objects", type=int, default=1, metavar="N", help="default: 1")
    memory.add_argument("--frames", type=int, default=8, metavar="N", help="before those measured (default: 8)")
    memory.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default: 32-true)")
    memory.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    tracking = _add(kinds, "tracking", "what a tracked frame costs end to end", TRACKING_EPILOG)
    tracking.add_argument("--engines", nargs="+", metavar="NAME", help="what to measure; default: all")
    for kind in (memory, tracking):
        kind.add_argument("--image-size", type=int, metavar="PX", help="default: the size's own")
        kind.add_argument("--repeats", type=int, default=5, metavar="N", help="frames measured (default: 5)")


def _add(kinds: Commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser = add_parser(kinds, name, _run, summary, epilog)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    parser.add_argument("--size", default="tiny", help="the model (default: tiny)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.overrides:
        raise UserError(f"{options.overrides[0]!r} is a key of a recipe, and this benchmark reads none: leave it out")
    make_room(options.json)
    quiet_logs(options)
    chosen = {flag: value for flag, value in vars(options).items() if flag not in OF_ALL_COMMANDS}
    if options.benchmark == "quantizers":
        from qsam2.benchmark.peers import PEERS
        from qsam2.benchmark.quantization import benchmark_quantizers, markdown_table

        chosen["peers"] = list(PEERS) if options.peers is None else options.peers
        result = benchmark_quantizers(**chosen)
    elif options.benchmark == "memory":
        from qsam2.benchmark.remembered_frames import benchmark_memory, markdown_table

        result = benchmark_memory(**chosen)
    else:
        from qsam2.benchmark.tracked_frame import benchmark_tracking, markdown_table

        result = benchmark_tracking(**chosen)
    print(markdown_table(result))
    write_json(options.json, result)
