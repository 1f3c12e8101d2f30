"""What fewer keys cost: J&F and fidelity of sharing and its competitors against what they save.

    python benchmarks/memory_accuracy.py --out DIR [--models float=nano W4A4=runs/ptq-w4a4] [--clips 40] [--render]

Tracks DAVIS val at 240p (QSAM2_DATA, full sequences) and MovingObjects clips of 48 frames with every setting of
`SETTINGS`, at 3, 4 and 2 of 7 frames, with each model. Clips are taken from the test split in its order until the count
is reached: two in three have an object that is hidden and returns, which is the one that is tracked, the others the
first object of a clip in which none is. Fidelity is the agreement with the same model that reads its whole memory as
`sam2` does. Images are encoded once a model. Each setting's scores are written as soon as they are there, and a run
that was killed goes on; `--render` prints the table of what is there and draws docs/memory.png.

Saved are multiply-adds of the memory attention (scores and weighted sums, layers' self-attention included) of `tiny` at
1024 px, for the share of the full bank's keys that nano was seen to read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from qsam2.benchmark.remembered_frames import attention_macs
from qsam2.data.sources import open_videos
from qsam2.data.synthetic.moving_objects import MovingObjects, moving_objects
from qsam2.data.video import Predictions, Video
from qsam2.evaluation.metrics.bootstrap import paired_bootstrap
from qsam2.evaluation.metrics.iou import mask_iou
from qsam2.evaluation.scoring import score_float, score_videos
from qsam2.loading import load_model
from qsam2.memory.reader import MemoryReader, use_memory
from qsam2.models import SAM2, build_sam2
from qsam2.output import write_text
from qsam2.recipe.memory import MemoryRecipe
from qsam2.recipe.recipe import EvaluateRecipe, TrainerRecipe
from qsam2.report.draw import BLUE, GREEN, GREY, ORANGE, PURPLE

DAVIS = "davis:davis16_240p:val"
CLIP_FRAMES = 48
RETURNING = 2 / 3
"""Share of the clips whose tracked object is hidden and returns."""
HIDDEN, GONE_FRAMES = 0.05, 3
"""An object is hidden where it shows less than this share of its largest area, for at least so many frames."""
WHOLE = "whole"
POLICIES = {"adaptive": BLUE, "oldest": ORANGE, "stride": GREEN, "pool": PURPLE, "sparse": "#e69f00", "synthesis": GREY}
BUDGETS = (3, 4, 2)
SETTINGS: dict[str, MemoryRecipe] = {
    WHOLE: MemoryRecipe(bounded=True),
    "cache": MemoryRecipe(cache=True, bounded=True),
    **{
        f"{policy} {frames}": MemoryRecipe(cache=True, sharing=policy, frames=frames, bounded=True)  # type: ignore[arg-type]
        for frames in BUDGETS
        for policy in POLICIES
    },
    "prompted 1": MemoryRecipe(cache=True, sharing="oldest", frames=1, bounded=True),
}
GROUPS = ("all", "slow", "fast", "davis", "returning")
TOKENS, POINTERS = 4096, 64
"""Of a remembered frame and of a full bank at 1024 px."""
PLOT = Path(__file__).parent.parent / "docs" / "memory.png"


def main() -> None:
    """Score what is not scored yet, or draw what is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["float=nano"], metavar="NAME=MODEL")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=7, help="of DAVIS")
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    if given.render:
        render(given.out)
        return
    videos = [Held(video) for video in [*open_videos(DAVIS)[: given.sequences], *clips(given.clips)]]
    write_text(given.out / "videos.json", json.dumps({video.name: vars(video)["about"] for video in videos}, indent=1))
    models = {name: cached_images(load_model(target)[0]) for name, target in (m.split("=", 1) for m in given.models)}
    for setting, memory in SETTINGS.items():
        for name, model in models.items():
            file = given.out / name / f"{setting.replace(' ', '-')}.json"
            if not file.is_file():
                write_text(file, json.dumps(scores(model, memory, videos, given.out)))


# Videos


class Held(Video):
    """A video in memory, of which one object is tracked.

    `about`: how fast that object moves (share of its size a frame), and whether it is hidden and returns.
    """

    def __init__(self, video: Video) -> None:
        self.name, self.frame_names, self.size = video.name, video.frame_names, video.size
        self.frames = [video.frame(index) for index in range(len(video))]
        masks = [video.masks(index) or {} for index in range(len(video))]
        away = {item: returns([each[item].sum() for each in masks]) for item in masks[0]}
        tracked = max(away, key=lambda item: (away[item], -item))
        self.kept = [{1: each.get(tracked, np.zeros(self.size, dtype=bool))} for each in masks]
        self.about = {"speed": speed([each[1] for each in self.kept]), "returning": away[tracked]}

    def frame(self, index: int) -> np.ndarray:
        return self.frames[index]

    def masks(self, index: int) -> dict[int, np.ndarray]:
        return self.kept[index]


def clips(count: int) -> Iterator[MovingObjects]:
    """The first of the test split, of either kind as many as are wanted."""
    wanted = {True: round(count * RETURNING), False: count - round(count * RETURNING)}
    for video in moving_objects("test", 10 * count, num_frames=CLIP_FRAMES):
        areas: dict[int, list[int]] = {}
        for index in range(CLIP_FRAMES):
            for item, mask in video.masks(index).items():
                areas.setdefault(item, []).append(int(mask.sum()))
        kind = any(map(returns, areas.values()))
        if wanted[kind]:
            wanted[kind] -= 1
            yield video
        if not any(wanted.values()):
            return


def returns(areas: Sequence[int]) -> bool:
    """Whether an object is hidden for a while and then seen again."""
    seen = "".join("-" if area < HIDDEN * max(areas) else "x" for area in areas)
    return "-" * GONE_FRAMES in seen.rstrip("-")


def speed(masks: Sequence[np.ndarray]) -> float:
    """The median way of a mask's middle from frame to frame, over the root of its area."""
    ways = []
    for before, after in zip(masks, masks[1:], strict=False):
        if before.any() and after.any():
            middles = [np.argwhere(mask).mean(axis=0) for mask in (before, after)]
            ways.append(np.linalg.norm(middles[1] - middles[0]) / np.sqrt(before.sum()))
    return float(np.median(ways)) if ways else 0.0


# Scores


def cached_images(model: SAM2) -> SAM2:
    """The model, its image encoder run once for each different image."""
    encode: Callable[[Tensor], dict[str, Any]] = model.forward_image
    known: dict[bytes, dict[str, Any]] = {}
    positions: list[Tensor] = []

    def forward_image(image: Tensor) -> dict[str, Any]:
        key = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        if key not in known:
            encoded = encode(image)
            positions[:] = positions or encoded["vision_pos_enc"]  # the same for all images
            known[key] = {**encoded, "vision_pos_enc": positions}
        return {name: list(value) if isinstance(value, list) else value for name, value in known[key].items()}

    model.forward_image = forward_image
    return model


def scores(model: SAM2, memory: MemoryRecipe, videos: Sequence[Video], out: Path) -> dict[str, Any]:
    """{"per_object": {video: {object: {"J&F", "J", "F", "fidelity"}}}, "keys": read a frame, "sums_memory": whether the
    weighted sums are of the memory rather than of its values, ...}.
    """
    evaluation, trainer = EvaluateRecipe(float_cache=out / "whole"), TrainerRecipe(accelerator="cpu", devices=1)
    use_memory(model, SETTINGS[WHOLE])
    whole_block, whole = score_float(model, videos, evaluation, trainer, folder=out)
    if memory == SETTINGS[WHOLE]:
        return whole_block
    use_memory(model, memory)
    reader = model.memory_reader
    assert isinstance(reader, MemoryReader)
    keys: list[int] = []
    hook = model.memory_attention.norm.register_forward_hook(lambda *_: keys.append(reader.reading.keys))
    block, masks = score_videos(model, videos, evaluation, trainer, folder=out)
    hook.remove()
    for (video, item), fidelity in agreement(masks, whole, videos).items():
        block["per_object"][video][str(item)]["fidelity"] = fidelity
    narrow = reader.reading.value_channels < model.hidden_dim
    return {**block, "keys": float(np.mean(keys)), "sums_memory": narrow}


def agreement(masks: Predictions, whole: Predictions, videos: Sequence[Video]) -> dict[tuple[str, int], float]:
    """Mean IoU in percent of two models' masks, an object each."""
    shapes = {video.name: (len(video), *video.size) for video in videos}
    found = {}
    for name in masks:
        shape = shapes[name[0]]
        pair = (np.unpackbits(packed[name], count=np.prod(shape)).reshape(shape) for packed in (masks, whole))
        found[name] = float(100 * mask_iou(*(each.astype(bool) for each in pair)).mean())
    return found


# Table and plot


def render(out: Path) -> None:
    """Prints a table a model, draws the plot."""
    about = json.loads((out / "videos.json").read_text())
    models = sorted(
        (path.parent.name for path in out.glob(f"*/{WHOLE}.json")), key=lambda name: (name != "float", name)
    )
    tiny = build_sam2("tiny")
    figure, axes = plt.subplots(3, len(models), figsize=(5 * len(models), 9), layout="constrained", squeeze=False)
    for column, name in enumerate(models):
        blocks = {
            setting: json.loads(file.read_text())
            for setting in SETTINGS
            if (file := out / name / f"{setting.replace(' ', '-')}.json").is_file()
        }
        saved = {setting: saving(tiny, block, blocks["cache"]) for setting, block in blocks.items() if "keys" in block}
        print(table(name, blocks, saved, about))
        draw(axes[:, column], name, blocks, saved, groups(about)["davis"])
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(POLICIES), frameon=False
    )
    figure.savefig(PLOT, dpi=110)


def saving(tiny: SAM2, block: Mapping[str, Any], full: Mapping[str, Any]) -> float:
    """How many times fewer multiply-adds than stock sam2 memory attention needs at 1024 px."""
    keys = 7 * TOKENS + POINTERS
    share = block["keys"] / full["keys"]
    channels = tiny.mem_dim if block["sums_memory"] else tiny.hidden_dim
    return attention_macs(tiny, keys, tiny.hidden_dim) / attention_macs(tiny, round(share * keys), channels)


def groups(about: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """Names of the videos by `GROUPS`; slow and fast are the halves."""
    median = np.median([each["speed"] for each in about.values()])
    fast = {name for name, each in about.items() if each["speed"] > median}
    clips = {name for name in about if name.startswith("moving-")}
    returning = {name for name in clips if about[name]["returning"]}
    return dict(zip(GROUPS, (set(about), set(about) - fast, fast, set(about) - clips, returning), strict=True))


def table(name: str, blocks: Mapping[str, Any], saved: Mapping[str, float], about: Mapping[str, Any]) -> str:
    """Differences to the whole memory, a row a setting; then by how much sharing is ahead of each competitor."""
    parts = groups(about)
    counts = ", ".join(f"{part} {len(names)}" for part, names in parts.items())
    whole = blocks[WHOLE]["per_object"]
    lines = [
        f"\n{name}: J&F {blocks[WHOLE]['J&F']:.1f} with the whole memory; videos: {counts}\n",
        f"| setting | times fewer MACs | fidelity | {' | '.join(parts)} |",
        f"|---|---|---|{'---|' * len(parts)}",
    ]
    ahead = [
        "\n| adaptive against | J&F, all | J&F, davis | fidelity, all | fidelity, davis |",
        "|---|---|---|---|---|",
    ]
    for setting, factor in saved.items():
        block = blocks[setting]["per_object"]
        fidelity = np.mean([item["fidelity"] for items in block.values() for item in items.values()])
        cells = [setting, f"{factor:.2f}", f"{fidelity:.1f}"]
        cells += [difference(only(block, names), only(whole, names)) for names in parts.values()]
        lines.append(f"| {' | '.join(cells)} |")
        sharing = blocks.get(f"adaptive {setting.split()[-1]}")
        if sharing is not None and not setting.startswith("adaptive"):
            pairs = [[only(each, parts[part]) for each in (sharing["per_object"], block)] for part in ("all", "davis")]
            cells = [difference(*pair, key=key) for key in ("J&F", "fidelity") for pair in pairs]
            ahead.append(f"| {' | '.join([setting, *cells])} |")
    return "\n".join([*lines, *ahead])


def difference(block: Mapping[str, Any], other: Mapping[str, Any], key: str = "J&F") -> str:
    """With its 95 % interval; nothing where there is no such video."""
    if not block:
        return ""
    found = paired_bootstrap(block, other, key=key)
    return f"{found['difference']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def only(block: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The part of `per_object` with these videos."""
    return {video: items for video, items in block.items() if video in names}


def draw(
    axes: Sequence[Any], name: str, blocks: Mapping[str, Any], saved: Mapping[str, float], davis: set[str]
) -> None:
    """Difference in J&F with its interval, and fidelity on DAVIS and on the clips, over what is saved."""
    whole = blocks[WHOLE]["per_object"]
    clips = set(whole) - davis
    for index, (policy, colour) in enumerate(POLICIES.items()):
        points = sorted((factor, setting) for setting, factor in saved.items() if setting.split()[0] == policy)
        if not points:
            continue
        x = [factor * (1 + 0.004 * (index - 2.5)) for factor, _ in points]  # apart, so that intervals can be told
        found = [paired_bootstrap(blocks[setting]["per_object"], whole) for _, setting in points]
        y = [each["difference"] for each in found]
        error = [
            [each["difference"] - each["low"] for each in found],
            [each["high"] - each["difference"] for each in found],
        ]
        width = 2.0 if policy == "adaptive" else 1.0
        axes[0].errorbar(
            x, y, error, color=colour, marker="o", capsize=2, linewidth=width, elinewidth=0.6, label=policy
        )
        for axis, names in ((axes[1], davis), (axes[2], clips)):
            if not names:
                continue
            parts = [only(blocks[setting]["per_object"], names) for _, setting in points]
            faithful = [
                np.mean([item["fidelity"] for items in part.values() for item in items.values()]) for part in parts
            ]
            axis.plot(x, faithful, color=colour, marker="o", linewidth=width)
    axes[0].set(title=name, ylabel="J&F, difference to the whole memory")
    axes[0].axhline(0, color=GREY, linewidth=0.6)
    axes[1].set(ylabel="fidelity to the whole memory, DAVIS")
    axes[2].set(xlabel="times fewer multiply-adds in memory attention", ylabel="the same, generated clips")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
