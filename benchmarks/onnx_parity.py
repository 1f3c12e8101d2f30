"""How far an exported model agrees with the fake-quantized one: integers, outputs, masks of whole clips.

    python benchmarks/onnx_parity.py [--clips 5] [--frames 10] [--json OUT] [nano:256:8 ...]

A case is SIZE:PIXELS:BITS; nano has its weights, other sizes random ones that see objects. Ranges are calibrated on two
generated clips and two stills, clips to track are others. ONNX Runtime runs without graph optimization, one thread.

Integers, on the inputs that each graph gets in the first clip's frames, are compared at every quantizer twice: the
graph computes all from its inputs; every quantizer's consumers are given PyTorch's values, so that only what lies
between two quantizers is compared. Masks are compared with less and less given: each graph PyTorch's inputs, each frame
PyTorch's memory, nothing; as a measure of what rounding borders do, PyTorch is compared with itself, what every
quantizer gets moved by a relative 1e-7 (the last bit of a float32). Last both compute in float64, ONNX by the reference
evaluator of the `onnx` package, where the order of a sum does not matter: what differs then is a fault of the export.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy.special import erf
from torch import Tensor, nn

from qsam2.calibration.activation_ranges import find_sam2_ranges
from qsam2.data.calibration_data import CalibrationData
from qsam2.data.clips import Source
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.video import Video
from qsam2.formats.onnx.graphs import Graph, build_graphs
from qsam2.formats.onnx.grids import ActivationGrid
from qsam2.formats.onnx.runtime import OnnxTracker, RunGraph
from qsam2.formats.onnx.write import describe, export_onnx
from qsam2.layers.convert import convert, finalize
from qsam2.loading import load_model
from qsam2.models import SAM2, build_sam2
from qsam2.recipe import build_recipe

CASES = ("nano:256:8", "nano:256:4", "tiny:256:8", "tiny:256:4")
NOISE = 1e-7
Array = NDArray[Any]
Calls = list[tuple[str, dict[str, Array], list[Array]]]
"""Graphs that were computed, in order: name, inputs, outputs."""


def quantized_model(size: str, image_size: int, bits: int) -> SAM2:
    """Finalized, weights and activations of so many bits, ranges of least error."""
    torch.manual_seed(0)
    if size == "nano":
        model, _ = load_model(size, [f"model.image_size={image_size}"])
    else:
        model = build_sam2(size, image_size=image_size)
        # random weights see no object, and their masks hardly leave 0
        nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
        for head in model.sam_mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight.data *= 30
    quantizer = {"method": "minmax", "bits": bits, "range": "mse"}
    amount = {"clips": 2, "stills": 2, "num_frames": 4}
    recipe = build_recipe({"quantize": {"weights": quantizer, "activations": quantizer}, "calibrate": amount})
    assert recipe.quantize is not None and recipe.calibrate is not None
    convert(model.eval(), recipe.quantize)
    source = Source(moving_objects("train", 8, num_frames=8, max_objects=1))
    data = CalibrationData([source], recipe.calibrate, image_size=image_size, max_objects=1, max_stride=1, seed=0)
    find_sam2_ranges(model, data, progress=False)
    finalize(model)
    return model


# Who computes a graph: name and inputs to outputs


def by_pytorch(graphs: dict[str, Graph], dtype: torch.dtype = torch.float32) -> RunGraph:
    def run(name: str, inputs: dict[str, Array]) -> list[Array]:
        given = [torch.from_numpy(np.ascontiguousarray(inputs[key])) for key in graphs[name].inputs]
        with torch.no_grad():
            outputs = graphs[name].module(*(x.to(dtype) if x.is_floating_point() else x for x in given))
        return [x.numpy().astype(np.float32) for x in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    return run


def by_pytorch_in_float64(graphs: dict[str, Graph]) -> RunGraph:
    """From now on these graphs are in float64."""
    for graph in graphs.values():
        graph.module.double()
    run = by_pytorch(graphs, torch.float64)

    def run_wide(name: str, inputs: dict[str, Array]) -> list[Array]:
        # the image encoder's neck and rotary encoding, for two, ask for float32 by name
        wide = patch.multiple(torch, float=torch.float64, float32=torch.float64)
        with wide, patch.object(Tensor, "float", Tensor.double):
            return run(name, inputs)

    return run_wide


def by_onnx_runtime(models: dict[str, onnx.ModelProto]) -> RunGraph:
    sessions = {name: session(model) for name, model in models.items()}
    return lambda name, inputs: sessions[name].run(None, inputs)


class Gelu(OpRun):
    """In place of the reference evaluator's, whose error function is rounded to float32."""

    op_domain = ""

    def _run(self, x: Array, approximate: str) -> tuple[Array]:
        assert approximate == "none"
        return (0.5 * x * (1 + erf(x / np.sqrt(2))),)


def by_reference(models: dict[str, onnx.ModelProto]) -> RunGraph:
    """The evaluator of the `onnx` package, in float64."""
    evaluators = {name: ReferenceEvaluator(in_float64(model), new_ops=[Gelu]) for name, model in models.items()}

    def run(name: str, inputs: dict[str, Array]) -> list[Array]:
        given = {key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in inputs.items()}
        return [np.asarray(x, np.float32) for x in evaluators[name].run(None, given)]

    return run


@contextlib.contextmanager
def moved(graphs: dict[str, Graph]) -> Iterator[None]:
    """What every quantizer of these graphs gets is moved by a relative `NOISE` meanwhile."""
    generator = torch.Generator().manual_seed(0)

    def move(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0] * (1 + NOISE * torch.randn(inputs[0].shape, generator=generator))

    grids = [m for graph in graphs.values() for m in graph.module.modules() if isinstance(m, ActivationGrid)]
    hooks = [grid.register_forward_pre_hook(move) for grid in set(grids)]
    yield
    for hook in hooks:
        hook.remove()


def noted(run: RunGraph, calls: Calls) -> RunGraph:
    def run_and_note(name: str, inputs: dict[str, Array]) -> list[Array]:
        outputs = run(name, inputs)
        calls.append((name, inputs, outputs))
        return outputs

    return run_and_note


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def as_meant(number: float) -> float:
    """A number of the program that a graph has as float32: n^(-1/4), by which attention scales, or a short decimal."""
    root = round(number**-4) ** -0.25 if 0 < number < 1 else 0.0
    return root if np.float32(root) == np.float32(number) else float(str(np.float32(number)))


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which all that was float32 is float64."""
    model = copy.deepcopy(model)
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    factors = {name for node in model.graph.node if node.op_type == "Mul" for name in node.input}
    for tensor in (*model.graph.initializer, *(a.t for a in attributes if a.HasField("t"))):
        if tensor.data_type == TensorProto.FLOAT:
            wide = numpy_helper.to_array(tensor).astype(np.float64)
            if wide.size == 1 and tensor.name in factors:
                wide = np.full_like(wide, as_meant(wide.item()))
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for attribute in attributes:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del model.graph.value_info[:]
    return model


# Integers


def activation_names(model: onnx.ModelProto) -> list[str]:
    """Of all quantized activations. What PyTorch quantizes several times alike is there once."""
    computed = {output for node in model.graph.node for output in node.output}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return [node.output[0] for node in nodes if node.input[0] in computed]


def with_activations(model: onnx.ModelProto, names: list[str], *, given: bool) -> onnx.ModelProto:
    """A copy that also returns these values; if `given`, their consumers read inputs NAME.given in their place."""
    model, wanted = copy.deepcopy(model), set(names)
    for node in model.graph.node if given else ():
        for index, name in enumerate(node.input):
            if name in wanted:
                node.input[index] = f"{name}.given"

    def values(suffix: str = "") -> list[onnx.ValueInfoProto]:
        return [onnx.helper.make_tensor_value_info(name + suffix, TensorProto.FLOAT, None) for name in names]

    model.graph.input.extend(values(".given") if given else ())
    model.graph.output.extend(values())
    return model


def activations_of_pytorch(graph: Graph, run: Callable[[], object]) -> tuple[list[Array], list[float]]:
    """Values of all quantizers in the order of computation, and their steps."""
    values: list[Array] = []
    steps: list[float] = []

    def note(grid: ActivationGrid, _: Any, out: Tensor) -> None:
        values.append(out.detach().numpy().copy())
        steps.append(grid.scale)

    hooks = [m.register_forward_hook(note) for m in graph.module.modules() if isinstance(m, ActivationGrid)]
    run()
    for hook in hooks:
        hook.remove()
    return values, steps


def place(name: str) -> int:
    """Which call of a quantizer a value is: the exporter numbers them, `quantize_dequantize_3` is the fourth one."""
    found = re.fullmatch(r"quantize_dequantize(?:_(\d+))?", name)
    assert found, name
    return int(found[1] or 0)


def compare_integers(graphs: dict[str, Graph], models: dict[str, onnx.ModelProto], calls: Calls) -> dict[str, Any]:
    """By graph: integers compared, share that differs, largest difference in steps, largest difference of an output."""
    table: dict[str, Any] = {}
    for name, model in models.items():
        names = activation_names(model)
        sessions = {given: session(with_activations(model, names, given=given)) for given in (False, True)}
        counts = {given: np.zeros(3) for given in sessions}  # all, different, steps
        error = 0.0
        for _, inputs, outputs in (call for call in calls if call[0] == name):
            values, steps = activations_of_pytorch(graphs[name], partial(by_pytorch(graphs), name, inputs))
            for given, each in sessions.items():
                known = {input.name for input in each.get_inputs()}
                more = {f"{value}.given": values[place(value)] for value in names} if given else {}
                found = each.run(None, {key: x for key, x in (inputs | more).items() if key in known})
                for value, x in zip(names, found[-len(names) :], strict=True):
                    step = steps[place(value)]
                    apart = np.abs(np.round(x / step) - np.round(values[place(value)] / step))
                    counts[given][:2] += np.array([apart.size, np.count_nonzero(apart)])
                    counts[given][2] = max(counts[given][2], apart.max())
                if not given:
                    pairs = zip(outputs, found, strict=False)
                    error = max(error, *(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in pairs))
        table[name] = {
            "integers": int(counts[False][0]),
            **{
                f"{key}, {'each quantizer given' if given else 'graph given'}": value
                for given in (True, False)
                for key, value in (
                    ("share unequal", counts[given][1] / counts[given][0]),
                    ("most steps", int(counts[given][2])),
                )
            },
            "largest error of an output": error,
        }
    return table


# Masks


def prompted(tracker: OnnxTracker, video: Video, frames: int) -> Array:
    """Masks of the first frame, (1, H, W)."""
    tracker.start(video.frame(0), video_length=frames)
    mask = next(mask for mask in (video.masks(0) or {}).values() if mask.any())
    return tracker.add(1, mask=mask)[None] > 0


def track(tracker: OnnxTracker, video: Video, frames: int) -> Array:
    """Masks (frames - 1, H, W) of the frames behind the first one, whose mask is given."""
    prompted(tracker, video, frames)
    return np.stack([tracker.track(video.frame(index))[0] > 0 for index in range(1, frames)])


def track_beside(tracker: OnnxTracker, teacher: OnnxTracker, video: Video, frames: int) -> tuple[Array, Array]:
    """Masks of both; the tracker starts each frame from the teacher's memory."""
    prompted(teacher, video, frames)
    masks = []
    for index in range(1, frames):
        state = {key: value for key, value in vars(teacher).items() if key not in ("model", "run_graph")}
        vars(tracker).update(copy.deepcopy(state))
        masks.append([each.track(video.frame(index))[0] > 0 for each in (tracker, teacher)])
    ours, theirs = zip(*masks, strict=True)
    return np.stack(ours), np.stack(theirs)


def iou(one: Array, other: Array) -> float:
    """Of all frames together; 1 where both are empty."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def compare_masks(
    onnx_run: RunGraph, graphs: dict[str, Graph], description: dict[str, Any], video: Video, frames: int
) -> dict[str, float]:
    """IoU of the masks of one clip, by what is given; beside it PyTorch's with itself."""
    calls: Calls = []
    pytorch = by_pytorch(graphs)

    def pytorch_moved(name: str, inputs: dict[str, Array]) -> list[Array]:
        with moved(graphs):
            return pytorch(name, inputs)

    teacher = OnnxTracker.of_graphs(description, noted(pytorch, calls))
    masks = track(teacher, video, frames)
    decoded = [(outputs[0] > 0, onnx_run(name, x)[0] > 0) for name, x, outputs in calls if name == "mask_decoder"]
    row = {
        "object, share of the picture": float(masks.mean()),
        "graphs given": iou(*(np.stack(part) for part in zip(*decoded, strict=True))),
    }
    for who, run in (("", onnx_run), ("PyTorch moved, ", pytorch_moved)):
        tracker = OnnxTracker.of_graphs(description, run)
        row[f"{who}frames given"] = iou(*track_beside(tracker, teacher, video, frames))
        row[f"{who}nothing given"] = iou(track(tracker, video, frames), masks)
    return row


def measure(case: str, clips: int, frames: int) -> dict[str, Any]:
    """All figures of a case."""
    size, image_size, bits = case.split(":")
    model = quantized_model(size, int(image_size), int(bits))
    graphs = build_graphs(model)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, {}, Path(folder), progress=False)
        models = {name: onnx.load(Path(folder) / f"{name}.onnx") for name in graphs}
    description = describe(model)
    videos = list(moving_objects("val", clips, num_frames=frames, max_objects=1))
    calls: Calls = []
    track(OnnxTracker.of_graphs(description, noted(by_pytorch(graphs), calls)), videos[0], min(frames, 4))
    integers = compare_integers(graphs, models, calls)
    run = by_onnx_runtime(models)
    masks = [compare_masks(run, graphs, description, video, frames) for video in videos]
    engines = (by_pytorch_in_float64(graphs), by_reference(models))
    for video, row in zip(videos, masks, strict=True):
        both = (track(OnnxTracker.of_graphs(description, engine), video, frames) for engine in engines)
        row["float64, nothing given"] = iou(*both)
    return {"integers": integers, "masks": masks}


def integers_table(integers: dict[str, Any]) -> str:
    columns = list(next(iter(integers.values())))
    lines = ["| graph | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in integers.items():
        cells = (f"{value:,}" if isinstance(value, int) else f"{value:.1e}" for value in row.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def masks_table(masks: list[dict[str, float]]) -> str:
    lines = ["| clip | " + " | ".join(masks[0]) + " |", "|---" * (len(masks[0]) + 1) + "|"]
    for clip, row in enumerate(masks):
        lines.append(f"| {clip} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="SIZE:PIXELS:BITS")
    parser.add_argument("--clips", type=int, default=5)
    parser.add_argument("--frames", type=int, default=10, help="of a clip")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for case in given.cases:
        found[case] = measure(case, given.clips, given.frames)
        print(
            f"## {case}\n\n{integers_table(found[case]['integers'])}\n\n{masks_table(found[case]['masks'])}\n",
            flush=True,
        )
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
