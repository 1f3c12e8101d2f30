"""`qsam2 predict`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qsam2.commands.common import Commands, add_parser, check_model, quiet_logs
from qsam2.errors import UserError

EPILOG = """examples:
  qsam2 predict nano photo.jpg --point 320,180 --out out/photo
  qsam2 predict runs/qat-w4a4 clip.mp4 --box 40,60,200,180 --out out/clip
  qsam2 predict nano frames/ --point 90,40 --point 10,10,0 --object 2 --frame 12 --point 200,80 --out out/two
  qsam2 predict nano /data/DAVIS/JPEGImages/480p/bear --mask /data/DAVIS/Annotations/480p/bear/00000.png --out out/bear

INPUT is a picture, a folder of frames (JPEG or PNG, in the order of their numbers) or a video file. Coordinates are in
its pixels, from the upper left corner. Prompts are of object 1 on frame 0, until --object or --frame before them says
otherwise; a mask picture of several ids prompts all of its objects, unless --object says whose it is.

A picture gives OUT/mask.png and OUT/overlay.png. A video is tracked from the prompts to its end and back to its start
and gives OUT/masks/ (a PNG a frame) and OUT/overlay.mp4. Masks are PNGs with a palette, as DAVIS has them: a pixel is
the id of its object, 0 is background. Where objects overlap, the surer one has the pixel; those that were prompted on
an earlier frame come first. Files appear when all are complete."""

PROMPTS = {
    "point": ("X,Y[,LABEL]", "a point on the object, or off it with LABEL 0"),
    "box": ("X0,Y0,X1,Y1", "a box around the object"),
    "mask": ("PNG", "a mask: of object ids, or black and white; a picture's is refined"),
    "object": ("N", "the prompts that follow are of object N, from 1 to 254 (default: 1)"),
    "frame": ("N", "the prompts that follow are on frame N, from 0 on (default: 0)"),
}


class _InOrder(argparse.Action):
    """Keeps prompts in the order of the command line: which object and frame they are of depends on it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        namespace.words = [*namespace.words, (self.dest, value)]


def add(commands: Commands) -> None:
    """The parser of `qsam2 predict`."""
    summary = "segment a picture or track objects through a video"
    usage = "%(prog)s [-h] MODEL INPUT PROMPT [PROMPT ...] --out OUT [options] [key=value ...]"
    parser = add_parser(commands, "predict", _predict, summary, EPILOG, usage)
    parser.add_argument("model", metavar="MODEL", help="run folder, file or size")
    parser.add_argument("input", type=Path, metavar="INPUT", help="picture, folder of frames or video file")
    parser.set_defaults(words=[])
    for name, (metavar, text) in PROMPTS.items():
        parser.add_argument(f"--{name}", action=_InOrder, metavar=metavar, help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of what is written")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    faster = "for speed: integers and bfloat16 where the processor has them, cached keys"
    parser.add_argument("--fast", action="store_true", help=faster)


def _predict(options: argparse.Namespace) -> None:
    check_model(options.model)
    if not options.input.exists():
        raise UserError(f"{options.input} does not exist: give a picture, a folder of frames or a video file")
    quiet_logs(options, trains=False)
    from qsam2.predict.predict import predict

    flags = ("out", "overrides", "device", "fast", "force")
    chosen = {flag: getattr(options, flag) for flag in flags}
    for path in predict(options.model, options.input, options.words, **chosen):
        print(path)
