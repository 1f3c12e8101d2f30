"""Engines of `qsam2 benchmark tracking`: sam2 in three ways, ONNX Runtime, OpenVINO, and ours.

All start from frames uint8 (S, S, 3), have the same weights, follow one object and keep a full memory bank.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsam2.benchmark.measure import Seconds
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.data.transforms import to_model_input
from qsam2.fast.model import make_fast
from qsam2.formats.onnx.runtime import GRAPHS, OnnxTracker, read_description
from qsam2.formats.onnx.write import export_onnx
from qsam2.layers.convert import convert
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.recipe import MemoryRecipe

PARTS = ("encoder", "memory", "decoder")
METHODS = {
    "forward_image": "encoder",
    "_prepare_memory_conditioned_features": "memory",
    "_encode_new_memory": "memory",
    "_forward_sam_heads": "decoder",
}
"""Of SAM2, with the part whose time they are."""
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

Frames = Sequence[NDArray[np.uint8]]


def now() -> float:
    """Seconds; on one thread those of the processor, which other programs disturb less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass
class Setting:
    """Settings that all engines share.

    Args:
        model: with random weights, float.
        frames: the video, made when it is asked for.
        folder: for files.
    """

    model: SAM2
    frames: Frames
    folder: Path
    _exported: Path | None = field(default=None, init=False)
    _quantized: SAM2 | None = field(default=None, init=False)

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
        state = model.init_state(_Normalised(self.frames, side), video_size=(side, side))
        model.add_new_mask(state, 0, 1, torch.from_numpy(self.mask))
        return model.propagate_in_video(state)

    def quantized(self) -> SAM2:
        """The model with image encoder and memory at W8A8, ranges from the first frames."""
        if self._quantized is None:
            model = copy.deepcopy(self.model)
            convert(model, W8A8)
            tracked = self.track(model)
            find_ranges(model, lambda _: next(tracked), range(CALIBRATION_FRAMES))
            self._quantized = model
        return self._quantized

    def exported(self) -> Path:
        """The folder of the model's ONNX graphs, written once."""
        if self._exported is None:
            export_onnx(self.model, {}, self.folder / "float", progress=False)
            self._exported = self.folder / "float"
        return self._exported


class Tracking:
    """A contestant: each call tracks one more frame, and gives its seconds and those of the three parts."""

    def __init__(self) -> None:
        self.taken = dict.fromkeys(PARTS, 0.0)

    def __call__(self) -> Seconds:
        self.taken = dict.fromkeys(PARTS, 0.0)
        started = now()
        self.step()
        return now() - started, *(self.taken[part] for part in PARTS)

    def step(self) -> None:
        raise NotImplementedError

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = now()
            result = function(*args, **kwargs)
            self.taken[part] += now() - started
            return result

        return run


class TorchTracking(Tracking):
    """A SAM2 that tracks with PyTorch, under autocast where a dtype is given."""

    def __init__(self, setting: Setting, model: SAM2, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        for method, part in METHODS.items():
            object.__setattr__(model, method, self.timed(part, getattr(model, method)))
        with self._precision():
            self.tracked = setting.track(model)

    def step(self) -> None:
        with self._precision():
            next(self.tracked)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype is not None)


class GraphTracking(Tracking):
    """Our tracker over the exported graphs, whoever computes them."""

    def __init__(self, setting: Setting, run: Callable[[str, Mapping[str, Any]], list[Any]]) -> None:
        super().__init__()
        parts = {name: self.timed(part, run) for name, part in GRAPH_PARTS.items()}
        description = read_description(setting.exported())
        self.tracker = OnnxTracker.of_graphs(description, lambda name, inputs: parts[name](name, inputs))
        self.frames, self.mask = iter(setting.frames), setting.mask

    def step(self) -> None:
        frame = next(self.frames)
        if self.tracker.object_ids:
            self.tracker.track(frame)
        else:
            self.tracker.start(frame)
            self.tracker.add(1, mask=self.mask)


class _Normalised(Sequence[Tensor]):
    def __init__(self, frames: Frames, side: int) -> None:
        self.frames, self.side = frames, side

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return to_model_input(self.frames[index], self.side)


def _sam2(setting: Setting) -> Tracking:
    return TorchTracking(setting, copy.copy(setting.model))


def _sam2_bf16(setting: Setting) -> Tracking:
    return TorchTracking(setting, copy.copy(setting.model), torch.bfloat16)


def _sam2_compile(setting: Setting) -> Tracking:
    model: Any = copy.deepcopy(setting.model)
    for part in ("image_encoder", "memory_encoder", "memory_attention", "sam_prompt_encoder", "sam_mask_decoder"):
        module = getattr(model, part)
        # sam2 does the same with max-autotune, which is for GPUs; only the number of memories varies
        module.forward = torch.compile(module.forward, dynamic=part == "memory_attention")
    return TorchTracking(setting, model)


def _onnxruntime(setting: Setting) -> Tracking:
    folder = setting.exported()
    return GraphTracking(setting, _run_onnxruntime({name: folder / f"{name}.onnx" for name in GRAPHS}))


def _onnxruntime_int8(setting: Setting) -> Tracking:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    files = {}
    for name in GRAPHS:
        graph = onnx.load(setting.exported() / f"{name}.onnx")
        del graph.graph.value_info[:]  # shapes of values between, which its own inference does not take as they are
        files[name] = setting.folder / f"{name}-int8.onnx"
        quantize_dynamic(graph, files[name], op_types_to_quantize=["MatMul", "Gemm"])
    return GraphTracking(setting, _run_onnxruntime(files))


def _run_onnxruntime(files: Mapping[str, Path]) -> Callable[[str, Mapping[str, Any]], list[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
    return lambda name, inputs: sessions[name].run(None, inputs)


def _openvino_int8(setting: Setting) -> Tracking:
    import nncf
    import openvino

    core = openvino.Core()
    graphs = {name: core.read_model(setting.exported() / f"{name}.onnx") for name in GRAPHS}
    seen: dict[str, list[Mapping[str, Any]]] = {name: [] for name in GRAPHS}
    run = _run_openvino(core, graphs)

    def watch(name: str, inputs: Mapping[str, Any]) -> list[Any]:
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


def _run_openvino(core: Any, graphs: Mapping[str, Any]) -> Callable[[str, Mapping[str, Any]], list[Any]]:
    # its default precision: bfloat16 where the processor has it
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    requests = {
        name: core.compile_model(graph, "CPU", options).create_infer_request() for name, graph in graphs.items()
    }

    def run(name: str, inputs: Mapping[str, Any]) -> list[Any]:
        found = requests[name].infer(inputs)
        return [found[index].copy() for index in range(len(found))]

    return run


def _ours(setting: Setting) -> Tracking:
    memory = MemoryRecipe(cache=True, sharing="adaptive", frames=SHARED_FRAMES, bounded=True)
    return _fast(setting, memory)


def _ours_exact(setting: Setting) -> Tracking:
    return _fast(setting, MemoryRecipe(cache=True, bounded=True))


def _fast(setting: Setting, memory: MemoryRecipe) -> Tracking:
    model = make_fast(copy.deepcopy(setting.quantized()))
    use_memory(model, memory)
    return TorchTracking(setting, model)


@dataclass(frozen=True)
class Engine:
    """An engine: its start, the packages it needs, and its note in the table."""

    start: Callable[[Setting], Tracking]
    packages: tuple[str, ...] = ()
    install: str = ""
    note: str = ""

    def missing(self) -> str | None:
        """Name of the package or instruction set that is missing; None if nothing is."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if self.start is _sam2_compile and not (shutil.which("g++") or shutil.which("clang++")):
            absent.append("a C++ compiler")
        return ", ".join(absent) or None


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_INSTALL_ONNX = "pip install 'qsam2[onnx]'"

ENGINES: dict[str, Engine] = {
    "sam2": Engine(_sam2, note="float32, eager"),
    "sam2 bf16": Engine(_sam2_bf16, note="autocast"),
    "sam2 compile": Engine(_sam2_compile, install="install g++", note="float32, torch.compile of its five modules"),
    "onnxruntime": Engine(_onnxruntime, _ONNX, _INSTALL_ONNX, "float32, the graphs that `qsam2 export` writes"),
    "onnxruntime int8": Engine(
        _onnxruntime_int8, _ONNX, _INSTALL_ONNX, "its dynamic quantization of all products with weights"
    ),
    "openvino int8": Engine(
        _openvino_int8,
        ("openvino", "nncf", *_ONNX),
        "pip install openvino nncf 'qsam2[onnx]'",
        "NNCF's static quantization but for prompt encoder and memory attention, whose scores it would keep for all "
        "layers at once: these in OpenVINO's own precision",
    ),
    "qsam2": Engine(_ours, note=f"`--fast`, W8A8; keys shared at {SHARED_FRAMES} frames"),
    "qsam2 exact": Engine(_ours_exact, note="`--fast`, W8A8; all keys read"),
}
"""All that is measured, by name."""
