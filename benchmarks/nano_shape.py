"""What nano's shape costs and wins: width and layers of memory attention, each trained by the same short plan.

    python benchmarks/nano_shape.py [--output runs/shapes] [--scores docs/nano_shape.json] [SHAPE ...]

Each shape is trained by recipes/pretrain_nano.yaml and pretrain_nano_clips.yaml, at their 256 px, cut to a few hundred
steps and to the sets that QSAM2_DATA holds in any case, then scored on generated videos and DAVIS, `val` both. A run
that was killed goes on where it was, and a shape whose scores are in the file is not trained again. Each call ends with
a table of the shapes in the file; their seconds a tracked frame are taken there, in turn, so that ratios hold on a busy
machine. What the input size is worth: nano.py resolution.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from qsam2 import cli
from qsam2.data.sources import open_videos
from qsam2.models import SAM2, load_sam2, sam2
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.replaced import replaced
from qsam2.run_folder import write_text
from qsam2.tasks.scoring import score_videos
from qsam2.tasks.tracking import first_masks, track
from qsam2.text import aligned

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SCORED = {"MovingObjects": ("moving_objects:20:val", 30), "DAVIS": ("davis:davis16_240p:val", 40)}
COMMON = [
    "data.train=[moving_objects:50000:train, davis:davis16_240p:train, yolo:coco128_seg]",
    "data.val=moving_objects:2:val",
    "evaluate.frames=4",
    "train.distill.imagenet=0",
    "train.ema=0.97",  # over 33 steps: the recipes' 500 are more than a run has
    "trainer.precision=32-true",  # which every processor multiplies
]
PLAN = {  # steps, warm-up and the sources' shares
    "pretrain_nano": ["trainer.max_steps=200", "train.warmup_steps=40", "data.weights=[4, 2, 4]"],
    "pretrain_nano_clips": ["trainer.max_steps=100", "train.warmup_steps=20", "data.weights=[6, 3, 1]"],
}
TIMED, REPEATS = 20, 7
"""Frames, and how often."""


def trunk(embed_dim: int) -> dict[str, Any]:
    """Changes to `NANO` for a trunk of another width."""
    channels = [8 * embed_dim, 4 * embed_dim, 2 * embed_dim, embed_dim]
    return {"image_encoder": {"trunk": {"embed_dim": embed_dim}, "neck": {"backbone_channel_list": channels}}}


SIDE_PX = 256
SHAPES: dict[str, dict[str, Any]] = {  # changes to NANO
    "nano: width 32, 2 layers": {},
    "width 16": trunk(16),
    "width 48": trunk(48),
    "4 layers of memory attention": {"memory_attention": {"num_layers": 4}},
}


def main() -> None:
    """Train and score the shapes asked for that are not finished, then time all that are and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="; ".join(SHAPES))
    parser.add_argument("--output", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--scores", type=Path, default=ROOT / "docs" / "nano_shape.json")
    parser.add_argument("--recipe", choices=PLAN, help=argparse.SUPPRESS)  # train one shape by it, and no more
    given = parser.parse_args()
    if unknown := set(given.shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}: choose from {'; '.join(SHAPES)}")
    if given.recipe:
        sys.exit(train(given.shapes[0], given.recipe, given.output))
    scores = json.loads(given.scores.read_text()) if given.scores.is_file() else {}
    for name in given.shapes or SHAPES:
        if name in scores:
            continue
        for recipe in PLAN:  # each in a process of its own: it starts others
            command = [sys.executable, __file__, "--recipe", recipe, "--output", str(given.output), name]
            if status := subprocess.run(command).returncode:
                sys.exit(status)  # it has said why
        model = load(name, given.output)
        scores[name] = {what: score(model, *source) for what, source in SCORED.items()}
        write_text(given.scores, json.dumps(scores, indent=1) + "\n")
    report({name: scores[name] for name in SHAPES if name in scores})


@contextlib.contextmanager
def shaped(name: str) -> Iterator[None]:
    """`nano` has this shape."""
    shape = OmegaConf.to_container(OmegaConf.merge(sam2.NANO, SHAPES[name]))
    with replaced(sam2, NANO=shape):
        yield


def shape_folder(name: str, output: Path) -> Path:
    """Where all of a shape lies, its runs by the names of their recipes."""
    return output / name.replace(" ", "-").replace(":", "").replace(",", "")


def train(name: str, recipe: str, output: Path) -> int:
    """One run of the plan, its exit status; the second goes on from the first."""
    first, folder = (shape_folder(name, output) / which for which in (next(iter(PLAN)), recipe))
    checkpoint = "null" if folder == first else first / "model.safetensors"
    own = [f"output={folder}", f"model.checkpoint={checkpoint}", f"model.image_size={SIDE_PX}"]
    with shaped(name):
        return cli.main(["train", str(RECIPES / f"{recipe}.yaml"), *COMMON, *PLAN[recipe], *own])


def load(name: str, output: Path) -> SAM2:
    """A shape that is trained."""
    file = shape_folder(name, output) / list(PLAN)[-1] / "model.safetensors"
    with shaped(name):
        return load_sam2("nano", checkpoint=file, image_size=SIDE_PX)


def score(model: SAM2, data: str, frames: int) -> float:
    """J&F."""
    recipe = EvaluateRecipe(frames=frames)
    return score_videos(model, open_videos(data), recipe, TrainerRecipe(), folder=Path("."))[0]["J&F"]


def report(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row a shape: parameters, bytes, seconds a frame over the first's, J&F."""
    models: dict[str, SAM2] = {}
    for name in scores:
        with shaped(name):
            models[name] = load_sam2("nano", checkpoint=None, image_size=SIDE_PX)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    video = open_videos("moving_objects:1:val")[0]
    first = first_masks(video, TIMED, later_objects=False)
    for _ in range(REPEATS):
        for name, model in models.items():
            started = time.perf_counter()
            track(model, video, first, length=TIMED, non_overlapping=True)
            seconds[name].append(time.perf_counter() - started)
    first_name = next(iter(models))
    rows = [["shape", "million parameters", "fp16 MB", f"time over {first_name}'s", *SCORED]]
    for name, model in models.items():
        million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        ratio = np.median(np.divide(seconds[name], seconds[first_name]))
        figures = [f"{million:.1f}", f"{2 * million:.1f}", f"{ratio:.2f}"]
        rows.append([name, *figures, *(f"{scores[name][what]:.1f}" for what in SCORED)])
    print(aligned(rows))


if __name__ == "__main__":
    main()
