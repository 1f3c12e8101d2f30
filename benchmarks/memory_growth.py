"""Bytes of a tracking state over a long video, growing as sam2's and bounded, and whether the masks are the same.

    python benchmarks/memory_growth.py [--model nano] [--frames 1000]

Tracks the first object of the first generated test video. Bytes are those of all tensors that the state holds.
"""

from __future__ import annotations

import argparse
import sys

import torch

from qsam2.benchmark.remembered_frames import state_bytes
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.transforms import FrameSequence
from qsam2.evaluation.tracking import first_masks
from qsam2.loading import load_model
from qsam2.memory.reader import use_memory
from qsam2.recipe.memory import MemoryRecipe

SHOWN = (20, 31, 50, 100, 200, 500)


def main() -> None:
    """Print a row a frame that is shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--frames", type=int, default=1000)
    given = parser.parse_args()
    model, _ = load_model(given.model)
    video = moving_objects("test", 1, num_frames=given.frames)[0]
    item, mask = next(iter(first_masks(video, 1, later_objects=False)[0].items()))
    frames = FrameSequence(video, model.image_size, given.frames)
    held: dict[bool, dict[int, int]] = {False: {}, True: {}}
    masks: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for bounded in held:
        use_memory(model, MemoryRecipe(bounded=bounded))
        state = model.init_state(frames, video_size=video.size)
        model.add_new_mask(state, 0, item, torch.from_numpy(mask))
        for index, _, logits in model.propagate_in_video(state):
            masks[bounded].append(logits > 0)
            if index in (*SHOWN, given.frames - 1):
                held[bounded][index] = state_bytes(state)
    print("| frame | sam2, MB | bounded, MB |\n|---|---|---|")
    for index in held[True]:
        print(f"| {index} | {held[False][index] / 1e6:.2f} | {held[True][index] / 1e6:.2f} |")
    different = sum(not torch.equal(*pair) for pair in zip(masks[False], masks[True], strict=True))
    print(f"\n{different} of {given.frames} masks differ")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
