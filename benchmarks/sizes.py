"""Every size: built, converted at W4A4, calibrated, one training step on two frames, one tracked frame.

    python benchmarks/sizes.py --json sizes.json [tiny:1024 small:768 ...]

Random weights, generated video, batch 1, one object, float32, LSC. Each size runs in a process of its own, so that its
peak memory is its own. Seconds are wall time on the machine at hand: compare them with each other only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

DEFAULT = ("nano:256", "tiny:1024", "small:768", "base_plus:768", "large:512")


def measure(size: str, image_size: int) -> dict[str, float | int | str]:
    """Seconds of each part and peak memory of one size."""
    import torch

    from qsam2.calibration.activation_ranges import find_ranges
    from qsam2.data.clips import ClipDataset, collate_clips
    from qsam2.data.synthetic.moving_objects import moving_objects
    from qsam2.evaluation.tracking import first_masks, track
    from qsam2.layers.convert import convert, finalize
    from qsam2.models import build_sam2
    from qsam2.recipe import build_recipe
    from qsam2.train.losses import segmentation_loss
    from qsam2.train.optimizer import adamw, parameter_groups
    from qsam2.train.prompts import prompted_forward, set_dropout, set_prompts

    quantizer = {"method": "lsc", "bits": 4}
    recipe = build_recipe({"quantize": {"weights": quantizer, "activations": quantizer}, "train": {}})
    assert recipe.train is not None and recipe.quantize is not None
    seconds: dict[str, float] = {}

    def timed(name, function):
        started = time.perf_counter()
        result = function()
        seconds[f"{name}_s"] = round(time.perf_counter() - started, 2)
        return result

    torch.manual_seed(0)
    model = timed("build", lambda: build_sam2(size, image_size=image_size))
    # Random weights see no object; without this all masks would be constant.
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    videos = moving_objects("train", 1, num_frames=2, max_objects=1)
    clips = ClipDataset(videos, num_frames=2, max_objects=1, image_size=image_size, length=1, augment=False)
    batch = collate_clips([clips[0]])
    timed("convert", lambda: convert(model, recipe.quantize))
    timed(
        "calibrate",
        lambda: find_ranges(model, lambda points: prompted_forward(model, batch, points=points), (False, True)),
    )
    set_prompts(model, recipe.train.prompts.model_copy(update={"point": 0.0, "box": 0.0, "conditioning_frames": 1}))
    set_dropout(model, 0.0)
    optimizer = adamw(parameter_groups(model, recipe.train))
    loss = segmentation_loss(recipe.train.losses)

    def step() -> float:
        total = loss(model.train()(batch), batch.masks)["core_loss"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach())

    total = timed("training_step", step)
    model.eval()
    finalize(model)
    prompts = first_masks(videos[0], 1, later_objects=False)
    timed("track_2_frames", lambda: track(model, videos[0], prompts, length=2, non_overlapping=True))
    return {
        "size": size,
        "image_size": image_size,
        "parameters_million": round(sum(p.numel() for p in build_sam2(size).parameters()) / 1e6, 1),
        **seconds,
        "loss": round(total, 3),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Measure the sizes asked for, one process each, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=DEFAULT, metavar="SIZE:PIXELS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        size, image_size = given.sizes[0].split(":")
        print(json.dumps(measure(size, int(image_size))))
        return
    rows = []
    for size in given.sizes:
        out = subprocess.run([sys.executable, __file__, "--worker", size], stdout=subprocess.PIPE, check=True).stdout
        rows.append(json.loads(out.decode().splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
