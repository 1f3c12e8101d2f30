"""What nano's shape costs and wins: width of its trunk and layers of its memory attention, each trained alike.

    python benchmarks/nano_shape.py [--output runs/shapes] [--scores docs/nano_shape.json] [SHAPE ...]

Training every shape as nano was trained takes a day of two cores each. Here a part of nano is made anew in each shape
and the rest taken over: an image encoder learns to give nano's image embeddings of pictures, a memory attention learns
to track in clips, together with all that is not the image encoder. Parts of nano's own shape are made anew as well,
since only what had the same training can be compared. Each is then scored on generated videos and DAVIS, `val` both. A
run that was killed goes on where it was, and a shape whose scores are in the file is not trained again; several calls
may share the file. Each call ends with a table of the shapes in the file; their seconds a tracked frame are taken
there, in turn, so that ratios hold on a busy machine. What the input size is worth: nano.py resolution.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from qsam2 import pipeline
from qsam2.data.sources import open_train, open_videos
from qsam2.errors import UserError
from qsam2.evaluation.scoring import score_videos
from qsam2.evaluation.tracking import first_masks, track
from qsam2.models import SAM2, load_sam2, sam2
from qsam2.models.replaced import replaced
from qsam2.output import aligned, write_text
from qsam2.recipe import load_recipe
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.run_folder import RunFolder
from qsam2.train.losses import embedding_distillation
from qsam2.train.video_training import VideoSegmentation

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SIDE_PX = 256
SCORED = {"MovingObjects": ("moving_objects:20:val", 20), "DAVIS": ("davis:davis16_240p:val", 24)}
COMMON = [
    "data.train=[moving_objects:50000:train, davis:davis16_240p:train, yolo:coco128_seg]",
    f"model.image_size={SIDE_PX}",
    "model.checkpoint=null",
    "train.distill.imagenet=0",
    "train.ema=0.97",  # over 33 steps: the recipes' 500 are more than a run has
    "trainer.devices=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",  # which every processor multiplies
]
PLAN = {  # the part that is made anew, its recipe and what differs from it
    "image_encoder": (
        "pretrain_nano",
        ["data.weights=[4, 2, 4]", "data.batch_size=12", "trainer.max_steps=280", "train.warmup_steps=20"],
    ),
    "memory_attention": (
        "pretrain_nano_clips",
        ["data.weights=[6, 3, 1]", "trainer.max_steps=140", "train.warmup_steps=10", "train.image_encoder_lr=0"],
    ),
}
TIMED, REPEATS = 20, 7
"""Frames, and how often."""


def trunk(embed_dim: int) -> dict[str, Any]:
    """Changes to `NANO` for a trunk of another width."""
    channels = [8 * embed_dim, 4 * embed_dim, 2 * embed_dim, embed_dim]
    return {"image_encoder": {"trunk": {"embed_dim": embed_dim}, "neck": {"backbone_channel_list": channels}}}


def memory_attention(layers: int) -> dict[str, Any]:
    """Changes to `NANO` for another number of layers."""
    return {"memory_attention": {"num_layers": layers}}


SHAPES: dict[str, dict[str, Any]] = {  # changes to NANO; nano has width 32 and 2 layers
    "nano as it ships": {},
    "width 32": trunk(32),
    "width 16": trunk(16),
    "width 48": trunk(48),
    "2 layers of memory attention": memory_attention(2),
    "1 layer of memory attention": memory_attention(1),
    "4 layers of memory attention": memory_attention(4),
}


class Imitation(VideoSegmentation):
    """The image encoder learns to give nano's image embeddings."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **{**named, "teacher": load_sam2("nano", image_size=SIDE_PX)})
        self.model.requires_grad_(False)
        self.model.image_encoder.requires_grad_(True)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Their squared error over the variance of nano's, summed over levels."""
        images = batch.flat_img_batch
        with torch.no_grad():
            theirs = self._teacher[0].forward_image(images)["backbone_fpn"]
        loss = embedding_distillation(self.model.forward_image(images)["backbone_fpn"], theirs)
        self.log("loss", loss, prog_bar=True)
        return loss


def main() -> None:
    """Train and score the shapes asked for that are not finished, then time all that are and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="; ".join(SHAPES))
    parser.add_argument("--output", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--scores", type=Path, default=ROOT / "docs" / "nano_shape.json")
    given = parser.parse_args()
    if unknown := set(given.shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}: choose from {'; '.join(SHAPES)}")
    for name in given.shapes or SHAPES:
        if name not in read(given.scores):
            try:
                model = trained(name, given.output)
                scores = {what: score(model, *source) for what, source in SCORED.items()}
            except UserError as error:
                parser.error(str(error))
            write_text(given.scores, json.dumps({**read(given.scores), name: scores}, indent=1) + "\n")
    done = read(given.scores)
    report({name: done[name] for name in SHAPES if name in done})


def read(file: Path) -> dict[str, dict[str, float]]:
    """The scores so far."""
    return json.loads(file.read_text()) if file.is_file() else {}


@contextlib.contextmanager
def shaped(name: str) -> Iterator[None]:
    """`nano` has this shape."""
    shape = OmegaConf.to_container(OmegaConf.merge(sam2.NANO, SHAPES[name]))
    with replaced(sam2, NANO=shape):
        yield


def trained(name: str, output: Path) -> SAM2:
    """nano with one part in this shape, made anew and trained."""
    if not SHAPES[name]:
        return load_sam2("nano", image_size=SIDE_PX)
    (part,) = SHAPES[name]
    file, differences = PLAN[part]
    folder = output / name.replace(" ", "-")
    recipe = load_recipe(RECIPES / f"{file}.yaml", [*COMMON, *differences, f"output={folder}"])
    torch.manual_seed(recipe.seed)
    with shaped(name):
        model = load_sam2("nano", checkpoint=None, image_size=SIDE_PX)
    nano = load_sam2("nano", image_size=SIDE_PX).state_dict()
    model.load_state_dict({**model.state_dict(), **{k: v for k, v in nano.items() if not k.startswith(part)}})
    task = Imitation if part == "image_encoder" else VideoSegmentation
    with replaced(pipeline, VideoSegmentation=task):
        pipeline.train(model, open_train(recipe), recipe, RunFolder(recipe), [])
    return model.eval()


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
