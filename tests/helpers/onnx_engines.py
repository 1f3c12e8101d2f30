"""Engines for the graphs of an exported model (PyTorch, ONNX Runtime, reference evaluator); agreement of integers.

ONNX Runtime runs without graph optimization, on one thread. In float64, where the order of a sum does not matter, ONNX
is computed by the reference evaluator of the `onnx` package: what differs there is a fault of the export.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
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
from torch import Tensor

from qsam2.formats.onnx.graphs import Graph
from qsam2.formats.onnx.grids import ActivationGrid
from qsam2.formats.onnx.runtime import RunGraph

Array = NDArray[Any]
Calls = list[tuple[str, dict[str, Array], list[Array]]]
"""Computed graphs in order: name, inputs, outputs."""


def by_pytorch(graphs: dict[str, Graph], dtype: torch.dtype = torch.float32) -> RunGraph:
    """Function (graph name, inputs) -> outputs that computes graphs in PyTorch, as float32 arrays."""

    def run(name: str, inputs: dict[str, Array]) -> list[Array]:
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[key])) for key in graphs[name].inputs]
        with torch.no_grad():
            outputs = graphs[name].module(*(x.to(dtype) if x.is_floating_point() else x for x in tensors))
        return [x.numpy().astype(np.float32) for x in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    return run


def by_pytorch_in_float64(graphs: dict[str, Graph]) -> RunGraph:
    """The same in float64; converts the graphs in place."""
    for graph in graphs.values():
        graph.module.double()
    run = by_pytorch(graphs, torch.float64)

    def run_wide(name: str, inputs: dict[str, Array]) -> list[Array]:
        # neck and rotary encoding, among others, ask for float32 by name
        wide = patch.multiple(torch, float=torch.float64, float32=torch.float64)
        with wide, patch.object(Tensor, "float", Tensor.double):
            return run(name, inputs)

    return run_wide


class Gelu(OpRun):
    """GELU in float64: the error function of the reference evaluator rounds to float32."""

    op_domain = ""

    def _run(self, x: Array, approximate: str) -> tuple[Array]:
        assert approximate == "none"
        return (0.5 * x * (1 + erf(x / np.sqrt(2))),)


def by_reference(models: dict[str, onnx.ModelProto]) -> RunGraph:
    """Function (graph name, inputs) -> outputs of the `onnx` package's evaluator, in float64."""
    evaluators = {name: ReferenceEvaluator(in_float64(model), new_ops=[Gelu]) for name, model in models.items()}

    def run(name: str, inputs: dict[str, Array]) -> list[Array]:
        wide = {key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in inputs.items()}
        return [np.asarray(x, np.float32) for x in evaluators[name].run(None, wide)]

    return run


def noted(run: RunGraph, calls: Calls) -> RunGraph:
    """`run`, which also appends every call to `calls`."""

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
    """Constant of the program that a graph holds as float32: n^(-1/4), the scale of attention, or a short decimal."""
    root = round(number**-4) ** -0.25 if 0 < number < 1 else 0.0
    return root if np.float32(root) == np.float32(number) else float(str(np.float32(number)))


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of a model with float64 in place of float32."""
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


def activation_names(model: onnx.ModelProto) -> list[str]:
    """Names of the quantized activations; equal quantizations of one value occur once."""
    computed = {output for node in model.graph.node for output in node.output}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return [node.output[0] for node in nodes if node.input[0] in computed]


def with_activations(model: onnx.ModelProto, names: list[str], *, teacher_forced: bool) -> onnx.ModelProto:
    """Copy that also returns these values; if `teacher_forced`, their consumers read the inputs NAME.teacher."""
    model, wanted = copy.deepcopy(model), set(names)
    for node in model.graph.node if teacher_forced else ():
        for index, name in enumerate(node.input):
            if name in wanted:
                node.input[index] = f"{name}.teacher"

    def values(suffix: str = "") -> list[onnx.ValueInfoProto]:
        return [onnx.helper.make_tensor_value_info(name + suffix, TensorProto.FLOAT, None) for name in names]

    model.graph.input.extend(values(".teacher") if teacher_forced else ())
    model.graph.output.extend(values())
    return model


def activations_of_pytorch(graph: Graph, run: Callable[[], object]) -> tuple[list[Array], list[float]]:
    """Outputs of all quantizers in the order of computation, and their steps."""
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
    """Index of the quantizer call that computes a value: `quantize_dequantize_3` is the fourth."""
    match = re.fullmatch(r"quantize_dequantize(?:_(\d+))?", name)
    assert match, name
    return int(match[1] or 0)


def compare_integers(graphs: dict[str, Graph], models: dict[str, onnx.ModelProto], calls: Calls) -> dict[str, Any]:
    """Agreement of ONNX Runtime with PyTorch by graph, over the inputs of `calls`.

    Every quantizer's consumers read PyTorch's values, so that only the operations between two quantizers are compared.

    Returns:
        by graph "integers" (their number), "share unequal", "most steps" (largest difference of two integers), and
        "largest error of an output" where the graph computes all from its own inputs, relative to the largest value.
    """
    table: dict[str, Any] = {}
    for name, model in models.items():
        names = activation_names(model)
        free, forced = (session(with_activations(model, names, teacher_forced=flag)) for flag in (False, True))
        known = {input.name for input in forced.get_inputs()}
        integers = unequal = most = 0
        error = 0.0
        for _, inputs, outputs in (call for call in calls if call[0] == name):
            values, steps = activations_of_pytorch(graphs[name], partial(by_pytorch(graphs), name, inputs))
            teacher = {f"{value}.teacher": values[place(value)] for value in names}
            quantized = forced.run(None, {key: x for key, x in (inputs | teacher).items() if key in known})
            for value, x in zip(names, quantized[-len(names) :], strict=True):
                step = steps[place(value)]
                apart = np.abs(np.round(x / step) - np.round(values[place(value)] / step))
                integers += apart.size
                unequal += np.count_nonzero(apart)
                most = max(most, int(apart.max()))
            used = {input.name for input in free.get_inputs()}
            pairs = zip(outputs, free.run(None, {key: x for key, x in inputs.items() if key in used}), strict=False)
            error = max(error, *(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in pairs))
        table[name] = {
            "integers": integers,
            "share unequal": unequal / integers,
            "most steps": most,
            "largest error of an output": error,
        }
    return table
