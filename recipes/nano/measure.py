"""The figures of nano's model card: tracking beside trivial baselines, the use of its memory, still images, speed.

    python recipes/nano/measure.py [--model nano] [--json OUT] [PART ...]

PARTs: davis (J&F a sequence; keeping the first mask and moving it by optical flow beside it), moving_objects (50 videos
of 40 frames of the test split), memory (both with fewer remembered frames), stills (box and click mIoU on coco_stills,
which nano never saw), speed. All of them by default; davis, memory and stills need QSAM2_DATA. Only on request:
pictures (docs/nano.jpg: three tracked videos), curve (docs/nano_training*.png: the loss of the runs of its
recipes that are found in runs/) and resolution (the same weights at other input sizes: J&F, and the time of a frame).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from qsam2.data.sources import open_videos
from qsam2.data.video import Video
from qsam2.evaluation.images import score_stills
from qsam2.evaluation.metrics.interval import interval_text
from qsam2.evaluation.metrics.scores import VOSScore
from qsam2.evaluation.scoring import compare, score_videos
from qsam2.evaluation.tracking import first_masks, track, true_masks
from qsam2.loading import load_model
from qsam2.models import SAM2, build_sam2
from qsam2.models.sam2 import EMBEDDED
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.report.overlays import contact_sheet
from qsam2.report.read import read_curves

DAVIS, MOVING, STILLS = "davis:davis16_240p:val", "moving_objects:50:test", "coco:coco_stills"
BANKS = {"full bank (7 frames, 16 pointers)": (7, 16), "prompted frame and the last": (2, 2), "prompted frame": (1, 2)}
"""Sizes of the memory that attention sees: (`num_maskmem`, `max_obj_ptrs_in_encoder`) of sam2, which
divides by the latter less one; the prompted frame is always kept."""
PICTURED = "moving_objects:3:val"
MOVING_VAL, OTHER_SIDES_PX = "moving_objects:16:val", (256, 384)
"""Data on which a size may be chosen, and the input sizes that stand beside nano's own."""
CURVES = {
    "nano_training.png": ("pretrain-nano", "pretrain-nano-clips", "pretrain-nano-long"),
    "nano_training_finish.png": ("pretrain-nano-finish-first", "pretrain-nano-finish"),
    "nano_training_whole.png": ("pretrain-nano-whole", "pretrain-nano-320"),
}
"""Pictures and the runs that each shows."""
SMOOTHING = 30
"""Logged steps that the line is the median of, in short runs a third: one clip can cost ten times another."""
DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    """Measure the parts asked for, print them, write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*PARTS, *ON_REQUEST]))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    known = PARTS | ON_REQUEST
    if unknown := set(arguments.parts) - set(known):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    model, recipe = load_model(arguments.model)
    if "resolution" in arguments.parts and (recipe.quantize or recipe.model.size not in EMBEDDED):
        parser.error(f"resolution wants a float {' or '.join(EMBEDDED)}, and {arguments.model} is none")
    results: dict[str, Any] = {"model": arguments.model}
    for part in arguments.parts or PARTS:
        results[part] = known[part](model)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


def davis(model: SAM2) -> dict[str, Any]:
    """J&F of every sequence, with the baselines."""
    videos = open_videos(DAVIS)
    blocks = {"nano": score(model, videos), "first mask": baseline(videos, keep), "DIS flow": baseline(videos, flow)}
    print(f"\n| sequence | {' | '.join(blocks)} |\n|---|{'---|' * len(blocks)}")
    for video in videos:
        print(f"| {video.name} | {' | '.join(cell(block['per_object'][video.name]) for block in blocks.values())} |")
    print(f"| all | {' | '.join(cell({'all': block}) for block in blocks.values())} |")
    return blocks


def moving_objects(model: SAM2) -> dict[str, Any]:
    """J&F of the fixed test videos, with the baselines."""
    videos = open_videos(MOVING)
    blocks = {"nano": score(model, videos), "first mask": baseline(videos, keep), "DIS flow": baseline(videos, flow)}
    for name, block in blocks.items():
        print(f"MovingObjects, {len(videos)} videos of {len(videos[0])} frames, {name}: J&F {block['J&F']:.1f}")
    return blocks


def memory(model: SAM2) -> dict[str, Any]:
    """J&F on both with the full memory bank and with less of it."""
    results: dict[str, Any] = {}
    encoding = model.maskmem_tpos_enc.detach()  # of the last frame, the one before it, ..., the prompted one
    for data in (DAVIS, MOVING):
        videos = open_videos(data)
        blocks: dict[str, Any] = {}
        for name, (frames, pointers) in BANKS.items():
            model.num_maskmem, model.max_obj_ptrs_in_encoder = frames, pointers
            model.maskmem_tpos_enc = torch.nn.Parameter(torch.cat([encoding[: frames - 1], encoding[-1:]]))
            blocks[name] = score(model, videos)
            print(f"{data}, {name}: {against(blocks[name], blocks[next(iter(BANKS))])}")
        results[data] = blocks
    model.num_maskmem, model.max_obj_ptrs_in_encoder = BANKS[next(iter(BANKS))]
    model.maskmem_tpos_enc = torch.nn.Parameter(encoding)
    return results


def stills(model: SAM2) -> dict[str, Any]:
    """Mean IoU over the instances of stills that were not trained on, from their boxes and from one click."""
    block, _ = score_stills(model, open_videos(STILLS))
    print({key: value for key, value in block.items() if not isinstance(value, (dict, list))})
    return block


def speed(model: SAM2) -> dict[str, Any]:
    """Frames a second of tracking one object, decoding included, and of the image encoder alone."""
    video = open_videos("moving_objects:1:test")[0]
    prompts = {0: {1: next(iter(first_masks(video, len(video))[0].values()))}}
    image = torch.zeros(1, 3, model.image_size, model.image_size)
    tracking = rate(lambda: track(model, video, prompts, length=len(video), non_overlapping=True), len(video))
    with torch.inference_mode():
        encoding = rate(lambda: model.forward_image(image), 1)
    result = {"threads": torch.get_num_threads(), "tracking_fps": tracking, "image_encoder_fps": encoding}
    print(result)
    return result


def resolution(model: SAM2) -> dict[str, Any]:
    """J&F of a float nano's weights at other input sizes, and the time of a tracked frame over that at their own.

    Nothing is trained. Times: the median of five passes over ten frames.
    """
    sides = (model.image_size, *OTHER_SIDES_PX)
    models = {side: build_sam2("nano", image_size=side) for side in sides}
    for other in models.values():
        other.load_state_dict(model.state_dict())
    video = open_videos("moving_objects:1:val")[0]
    prompts, length, repeats = first_masks(video, 10), 10, 5
    seconds: dict[int, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):  # in turn, so that ratios hold on a busy machine
        for side, other in models.items():
            started = time.perf_counter()
            track(other, video, prompts, length=length, non_overlapping=True)
            seconds[side].append(time.perf_counter() - started)
    results: dict[str, Any] = {}
    for side, other in models.items():
        blocks = {data: score(other, open_videos(data)) for data in (MOVING_VAL, DAVIS)}
        ratio = float(np.median(np.divide(seconds[side], seconds[model.image_size])))
        results[f"{side} px"] = {**blocks, "time": ratio}
        own = results[f"{model.image_size} px"]
        scores = "; ".join(f"{data} {against(block, own[data])}" for data, block in blocks.items())
        print(f"{side} px: {scores}; {ratio:.2f} times the time")
    return results


def against(block: dict[str, Any], reference: dict[str, Any]) -> str:
    """J&F, and its difference to the reference's with a 95 % interval."""
    return f"J&F {block['J&F']:.1f}, {interval_text(compare(block, reference))}"


def pictures(model: SAM2) -> None:
    """Truth and nano's masks on frames of three generated val videos (DAVIS's own may not be handed on)."""
    videos = open_videos(PICTURED)
    _, masks = score_videos(model, videos, EvaluateRecipe(), TrainerRecipe())
    sheets = [contact_sheet(video, {"nano": masks}) for video in videos]
    page = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    page.save(DOCS / "nano.jpg", quality=85)


def curve(model: SAM2) -> None:
    """The loss of the runs found, each on an axis of its own: their losses are of different clips."""
    for picture, runs in CURVES.items():
        if not all(Path("runs", run).is_dir() for run in runs):
            print(f"docs/{picture}: not drawn, as runs/ has not {' and '.join(runs)}")
            continue
        figure, axes = plt.subplots(1, len(runs), figsize=(10 / 3 * len(runs), 3), layout="constrained", squeeze=False)
        for axis, run in zip(axes[0], runs, strict=True):
            steps, losses = np.array(read_curves(Path("runs", run, "curves"))["loss"]).T
            width = min(SMOOTHING, max(len(losses) // 3, 1))
            axis.semilogy(steps, losses, ".", alpha=0.3)
            axis.plot(steps[width - 1 :], np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1))
            axis.set(xlabel="step", ylabel="loss", title=run)
        figure.savefig(DOCS / picture, dpi=110)


def rate(function: Callable[[], Any], frames: int, repeats: int = 7) -> float:
    """Frames a second, from the median of the repeats."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return round(frames / float(np.median(seconds)), 1)


def score(model: SAM2, videos: Sequence[Video]) -> dict[str, Any]:
    """The score block of semi-supervised tracking."""
    return score_videos(model, videos, EvaluateRecipe(), TrainerRecipe())[0]


def baseline(videos: Sequence[Video], move: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> dict:
    """The score block of a first mask that `move(previous frame, frame, previous mask)` carries on."""
    metric = VOSScore("davis")
    for video in videos:
        greys = [cv2.cvtColor(video.frame(index), cv2.COLOR_RGB2GRAY) for index in range(len(video))]
        for object_id, mask in first_masks(video, len(video))[0].items():
            masks = [mask]
            for before, after in zip(greys, greys[1:], strict=False):
                masks.append(move(before, after, masks[-1]))
            annotated, truth = true_masks(video, object_id, len(video))
            metric.update(video.name, object_id, np.stack(masks)[annotated], truth)
    return metric.compute()


def keep(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask stays where it is."""
    return mask


def flow(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask moves with DIS optical flow from the frame back to the one before."""
    back = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(after, before, None)
    rows, columns = np.indices(mask.shape, dtype=np.float32)
    moved = cv2.remap(mask.astype(np.float32), columns + back[..., 0], rows + back[..., 1], cv2.INTER_LINEAR)
    return moved > 0.5


def cell(objects: dict[str, Any]) -> str:
    """Mean J&F of a sequence's objects."""
    return f"{np.mean([scores['J&F'] for scores in objects.values()]):.1f}"


PARTS = {"davis": davis, "moving_objects": moving_objects, "memory": memory, "stills": stills, "speed": speed}
ON_REQUEST = {"pictures": pictures, "curve": curve, "resolution": resolution}


if __name__ == "__main__":
    main()
