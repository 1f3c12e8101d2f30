"""What calibration costs: seconds by stage against plain forward passes of the same data, and peak memory.

    python benchmarks/calibration_cost.py [tiny:1024 nano:256 ...] [--stills 4] [--clips 2] [--frames 6]

Random weights, generated video, W4A4; CPU time of one thread, which other programs disturb less. Ranges are compared
with tracking each clip in the float model from its masks, from a click and from a box, and encoding each still;
Frobenius calibration with encoding the same samples. That plain pass is timed before and after, and the ratio is to the
mean. Each row is measured in a process of its own, so that its peak memory is its own, the plain passes' included.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

DEFAULT = ("nano:256", "tiny:1024")
RANGES = ("minmax", "percentile", "mse", "entropy")
FROBENIUS = "frobenius"


def measure(size: str, image_size: int, row: str, stills: int, clips: int, frames: int) -> dict[str, Any]:
    """Seconds, the ratio to plain passes, and peak memory of one row: a kind of ranges, or Frobenius calibration."""
    import torch

    from qsam2.calibration.activation_ranges import find_sam2_ranges
    from qsam2.calibration.forward import encode, run_sample
    from qsam2.calibration.gram import gather_inputs
    from qsam2.calibration.weights import calibrate_layers, choose_layers, input_quantizers
    from qsam2.data.calibration_data import CalibrationData
    from qsam2.data.clips import Source
    from qsam2.data.synthetic.moving_objects import moving_objects
    from qsam2.layers.convert import convert
    from qsam2.models import build_sam2
    from qsam2.recipe import build_recipe

    torch.set_num_threads(1)
    torch.manual_seed(0)
    quantizer = {"method": "minmax", "bits": 4, "range": RANGES[0] if row == FROBENIUS else row}
    amount = {"stills": stills, "clips": clips, "num_frames": frames, "weights": {"method": FROBENIUS}}
    recipe = build_recipe({"quantize": {"weights": quantizer, "activations": quantizer}, "calibrate": amount})
    assert recipe.quantize is not None and recipe.calibrate.weights is not None
    model = build_sam2(size, image_size=image_size).eval()
    # Random weights see no object; without this all masks would be constant.
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    source = Source(moving_objects("train", stills + clips, num_frames=frames), 1.0)
    data = CalibrationData([source], recipe.calibrate, image_size=image_size, max_objects=1, max_stride=1, seed=0)

    def timed(function: Callable[[], object]) -> float:
        started = time.process_time()
        function()
        return time.process_time() - started

    def plain() -> None:
        for sample in data.samples():
            (encode if row == FROBENIUS else run_sample)(model, sample)

    def ranges() -> None:
        find_sam2_ranges(converted, data, progress=False)

    def frobenius() -> None:
        layers = choose_layers(converted, recipe.quantize, recipe.calibrate.weights.layers)
        samples = ((sample.label, sample) for sample in data.samples())
        quantizers = input_quantizers(layers, recipe.quantize)
        inputs = gather_inputs(layers, lambda sample: encode(converted, sample), samples, len(data), quantizers)
        list(calibrate_layers(layers, inputs, recipe.quantize, recipe.calibrate.weights))

    converted = copy.deepcopy(model)
    if row != FROBENIUS:  # which comes before conversion
        convert(converted, recipe.quantize)
    encode(model, next(iter(data.samples())))  # warm
    before, seconds, after = map(timed, (plain, frobenius if row == FROBENIUS else ranges, plain))
    return {
        "size": size,
        "pixels": image_size,
        "stage": "weights, Frobenius" if row == FROBENIUS else f"ranges, {row}",
        "seconds": round(seconds, 1),
        "plain passes, seconds": round((before + after) / 2, 1),
        "ratio": round(2 * seconds / (before + after), 2),
        "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def main() -> None:
    """Measure the sizes asked for, a process a row, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=DEFAULT, metavar="SIZE:PIXELS")
    parser.add_argument("--rows", nargs="+", choices=(*RANGES, FROBENIUS), default=(*RANGES, FROBENIUS))
    parser.add_argument("--stills", type=int, default=4)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        size, image_size = given.sizes[0].split(":")
        print(json.dumps(measure(size, int(image_size), given.rows[0], given.stills, given.clips, given.frames)))
        return
    options = [f"--stills={given.stills}", f"--clips={given.clips}", f"--frames={given.frames}"]
    header = False
    for size in given.sizes:
        for row in given.rows:
            command = [sys.executable, __file__, "--worker", size, "--rows", row, *options]
            out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            found = json.loads(out.decode().splitlines()[-1])
            if not header:
                print("| " + " | ".join(found) + " |\n|" + "---|" * len(found))
                header = True
            print("| " + " | ".join(str(value) for value in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
