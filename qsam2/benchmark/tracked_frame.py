"""Cost of a tracked frame end to end, with a full memory bank: sam2 in three ways, ONNX Runtime, OpenVINO, and ours.

All engines start from frames uint8 (S, S, 3), have the same weights, and follow one object.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsam2.benchmark.measure import WARM_UPS, Tracking, check_positive, machine, medians, random_sam2
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.data.transforms import to_model_input
from qsam2.errors import UserError
from qsam2.fast.model import make_fast
from qsam2.formats.onnx.runtime import GRAPHS, OnnxTracker, RunGraph, read_description
from qsam2.formats.onnx.write import export_onnx
from qsam2.layers.convert import convert
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.models.replaced import hide_progress_bar
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.recipe import MemoryRecipe
from qsam2.recipe.section import did_you_mean

PARTS = ("encoder", "memory", "decoder")
COLUMNS = ("seconds_per_frame", *(f"{part}_seconds" for part in PARTS))
METHODS = {
    "forward_image": "encoder",
    "_prepare_memory_conditioned_features": "memory",
    "_encode_new_memory": "memory",
    "_forward_sam_heads": "decoder",
}
"""Modules of SAM2, each with the part of a frame whose time it is."""
GRAPH_PARTS = dict(zip(GRAPHS, ("encoder", "memory", "memory", "decoder", "decoder"), strict=True))
SHARED_FRAMES = 3
CALIBRATION_FRAMES = 3
"""Frames whose inputs OpenVINO's quantization and ours see: time is what counts here, noise has no accuracy."""
W8A8 = QuantizeRecipe.model_validate(
    {
        "weights": {"method": "minmax", "bits": 8},
        "activations": {"method": "minmax", "bits": 8},
        "rules": [{"match": name, "keep_float": True} for name in ("sam_*", "obj_ptr_*", "mask_downsample")],
    }
)
"""Not mask decoder and prompt encoder, which `--fast` leaves in float: masks reach only parts of them."""


def benchmark_tracking(
    *, size: str, image_size: int | None, repeats: int, engines: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    """Tracks the same noise with the same random weights in all engines in turn, a frame each, on the CPU.

    Returns {ENGINE: {"seconds_per_frame", "encoder_seconds", "memory_seconds", "decoder_seconds"}}, medians over
    `repeats` frames, each behind a full bank; on one thread of its CPU time. Memory is memory attention and memory
    encoder, the decoder has the prompt encoder in it; what is left is reading the frame, and resizing and choosing
    masks. `engines` are of `ENGINES`; None: all whose packages are installed.

    Raises:
        UserError: a number, engine or size is impossible, or an engine that was asked for needs what is not installed.
    """
    check_positive(repeats=repeats)
    chosen = _chosen(engines)
    model = random_sam2(size, image_size)
    fill = max(model.num_maskmem - WARM_UPS, 1)  # the warm-ups fill the rest of the bank
    frames = Noise(model.image_size, fill + WARM_UPS + repeats)
    with tempfile.TemporaryDirectory() as folder, hide_progress_bar():
        setting = Setting(model, frames, Path(folder))
        runs = {name: ENGINES[name].start(setting) for name in chosen}
        for run in runs.values():
            for _ in range(fill):
                run()
        seconds = medians(runs, repeats, progress="tracking")
    return {name: dict(zip(COLUMNS, seconds[name], strict=True)) for name in runs}


def _chosen(engines: Sequence[str] | None) -> list[str]:
    if engines is None:
        return [name for name, engine in ENGINES.items() if engine.missing() is None]
    for name in engines:
        if name not in ENGINES:
            choice = f"choose from {', '.join(ENGINES)}{did_you_mean(name, ENGINES)}"
            raise UserError(f"--engines {name!r} is unknown: {choice}")
        if missing := ENGINES[name].missing():
            raise UserError(f"--engines {name!r} needs {missing}: {ENGINES[name].install}")
    return list(engines)


def markdown_table(result: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of `benchmark_tracking` as text, a row an engine, with its note; then what was left out and why."""
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = "CPU time of one thread" if about["threads"] == 1 else f"{about['threads']} threads"
    lines = [
        f"{about['cpu']}, {threads}, {versions}",
        "",
        "| engine | frame s | times faster | encoder s | memory s | decoder s | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        faster = f"{result['sam2']['seconds_per_frame'] / row['seconds_per_frame']:.2f}" if "sam2" in result else "-"
        frame, *parts = (f"{row[column]:.3f}" for column in COLUMNS)
        lines.append(f"| {' | '.join([name, frame, faster, *parts, ENGINES[name].note])} |")
    for name, engine in ENGINES.items():
        if missing := engine.missing():
            lines.append(f"{name} is left out, it needs {missing}: {engine.install}")
    return "\n".join(lines)


class Noise(Sequence[Any]):
    """Frames of noise, the same on each reading; with `normalised` as a model's input."""

    def __init__(self, side: int, length: int, *, normalised: bool = False) -> None:
        self.side, self.length, self.normalised = side, length, normalised

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(index)
        frame = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return to_model_input(frame, self.side) if self.normalised else frame


@dataclass
class Setting:
    """Parts that all engines share: the float model with random weights, the video, and a folder for files."""

    model: SAM2
    frames: Noise
    folder: Path

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Mask of the object on the first frame."""
        side = self.model.image_size
        mask = np.zeros((side, side), bool)
        mask[side // 4 : side // 2, : side // 2] = True
        return mask

    def track(self, model: SAM2) -> Iterator[Any]:
        """A frame with each `next`, from the mask on the first one."""
        side = model.image_size
        state = model.init_state(Noise(side, len(self.frames), normalised=True), video_size=(side, side))
        model.add_new_mask(state, 0, 1, torch.from_numpy(self.mask))
        return model.propagate_in_video(state)

    @cached_property
    def quantized(self) -> SAM2:
        """The model with image encoder and memory at W8A8, ranges from the first frames."""
        model = copy.deepcopy(self.model)
        convert(model, W8A8)
        tracked = self.track(model)
        find_ranges(model, lambda _: next(tracked), range(CALIBRATION_FRAMES))
        return model

    @cached_property
    def graphs(self) -> dict[str, Path]:
        """Files of the model's ONNX graphs, beside their description."""
        export_onnx(self.model, {}, self.folder / "float", progress=False)
        return {name: self.folder / "float" / f"{name}.onnx" for name in GRAPHS}


class TorchTracking(Tracking):
    """A SAM2 that tracks with PyTorch, under autocast if a dtype is given."""

    parts = PARTS

    def __init__(self, setting: Setting, model: SAM2, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        for method, part in METHODS.items():
            object.__setattr__(model, method, self.timed(part, getattr(model, method)))
        self.model = model
        with self._precision():
            self.tracked = setting.track(model)

    def step(self) -> None:
        with self._precision():
            next(self.tracked)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype is not None)


class GraphTracking(Tracking):
    """Our tracker over the exported graphs, whoever computes them."""

    parts = PARTS

    def __init__(self, setting: Setting, run: RunGraph) -> None:
        super().__init__()
        runs = {name: self.timed(part, run) for name, part in GRAPH_PARTS.items()}
        description = read_description(next(iter(setting.graphs.values())).parent)
        self.tracker = OnnxTracker.of_graphs(description, lambda name, inputs: runs[name](name, inputs))
        self.frames, self.mask = iter(setting.frames), setting.mask

    def step(self) -> None:
        frame = next(self.frames)
        if self.tracker.object_ids:
            self.tracker.track(frame)
        else:
            self.tracker.start(frame)
            self.tracker.add(1, mask=self.mask)


def _sam2(setting: Setting, dtype: torch.dtype | None = None) -> Tracking:
    return TorchTracking(setting, copy.copy(setting.model), dtype)


def _sam2_compile(setting: Setting) -> Tracking:
    model: Any = copy.deepcopy(setting.model)
    for part in ("image_encoder", "memory_encoder", "memory_attention", "sam_prompt_encoder", "sam_mask_decoder"):
        module = getattr(model, part)
        # sam2 does the same with max-autotune, which is for GPUs; only the number of memories varies
        module.forward = torch.compile(module.forward, dynamic=part == "memory_attention")
    return TorchTracking(setting, model)


def _onnxruntime(setting: Setting) -> Tracking:
    return GraphTracking(setting, _run_onnxruntime(setting.graphs))


def _onnxruntime_int8(setting: Setting) -> Tracking:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    files = {}
    for name, file in setting.graphs.items():
        graph = onnx.load(file)
        del graph.graph.value_info[:]  # shapes of values between, which its own inference does not take as they are
        files[name] = setting.folder / f"{name}-int8.onnx"
        quantize_dynamic(graph, files[name], op_types_to_quantize=["MatMul", "Gemm"])
    return GraphTracking(setting, _run_onnxruntime(files))


def _run_onnxruntime(files: Mapping[str, Path]) -> RunGraph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
    return lambda name, inputs: sessions[name].run(None, inputs)


def _openvino_int8(setting: Setting) -> Tracking:
    import nncf
    import openvino

    core = openvino.Core()
    graphs = {name: core.read_model(file) for name, file in setting.graphs.items()}
    seen: dict[str, list[Mapping[str, Any]]] = {name: [] for name in GRAPHS}
    run = _run_openvino(core, graphs)

    def watch(name: str, inputs: dict[str, Any]) -> list[Any]:
        seen[name].append(inputs)
        return run(name, inputs)

    watched = GraphTracking(setting, watch)
    for _ in range(CALIBRATION_FRAMES):
        watched.step()
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # its bars
        for name in ("image_encoder", "memory_encoder", "mask_decoder"):
            dataset = nncf.Dataset(seen[name])
            graphs[name] = nncf.quantize(graphs[name], dataset, model_type=nncf.ModelType.TRANSFORMER)
    return GraphTracking(setting, _run_openvino(core, graphs))


def _run_openvino(core: Any, graphs: Mapping[str, Any]) -> RunGraph:
    # its default precision: bfloat16 where the processor has it
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    requests = {
        name: core.compile_model(graph, "CPU", options).create_infer_request() for name, graph in graphs.items()
    }

    def run(name: str, inputs: Mapping[str, Any]) -> list[Any]:
        found = requests[name].infer(inputs)
        return [found[index].copy() for index in range(len(found))]

    return run


def _ours(setting: Setting, **sharing: Any) -> Tracking:
    model = make_fast(copy.deepcopy(setting.quantized))
    use_memory(model, MemoryRecipe(cache=True, bounded=True, **sharing))
    return TorchTracking(setting, model)


@dataclass(frozen=True)
class Engine:
    """An engine: its start, its note in the table, what it needs (packages, or COMPILER), and how to install that."""

    start: Callable[[Setting], Tracking]
    note: str = ""
    needs: tuple[str, ...] = ()
    install: str = ""

    def missing(self) -> str | None:
        """Names of the packages and programs that the engine needs and that are absent; None if none is."""
        absent = [name for name in self.needs if name != COMPILER and importlib.util.find_spec(name) is None]
        if COMPILER in self.needs and not (shutil.which("g++") or shutil.which("clang++")):
            absent.append(COMPILER)
        return ", ".join(absent) or None


COMPILER = "a C++ compiler"
_ONNX = (("onnx", "onnxscript", "onnxruntime"), "pip install 'qsam2[onnx]'")

ENGINES: dict[str, Engine] = {
    "sam2": Engine(_sam2, "float32, eager"),
    "sam2 bf16": Engine(partial(_sam2, dtype=torch.bfloat16), "autocast"),
    "sam2 compile": Engine(_sam2_compile, "float32, torch.compile of its five modules", (COMPILER,), "install g++"),
    "onnxruntime": Engine(_onnxruntime, "float32, the graphs that `qsam2 export` writes", *_ONNX),
    "onnxruntime int8": Engine(_onnxruntime_int8, "its dynamic quantization of all products with weights", *_ONNX),
    "openvino int8": Engine(
        _openvino_int8,
        "NNCF's static quantization but for prompt encoder and memory attention, whose scores it would keep for all "
        "layers at once: these in OpenVINO's own precision",
        ("openvino", "nncf", *_ONNX[0]),
        "pip install openvino nncf 'qsam2[onnx]'",
    ),
    "qsam2": Engine(
        partial(_ours, sharing="adaptive", frames=SHARED_FRAMES),
        f"`--fast`, W8A8; keys shared at {SHARED_FRAMES} frames",
    ),
    "qsam2 exact": Engine(_ours, "`--fast`, W8A8; all keys read"),
}
"""All that is measured, by name."""
