"""ONNX files in tests: run them, look into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime


def run(model: onnx.ModelProto | Path, inputs: dict[str, Any], *, optimize: bool = False) -> list[np.ndarray]:
    """All outputs, in order."""
    data = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, inputs)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def activations(model: onnx.ModelProto) -> list[str]:
    """Names of all quantized activations, in the order of computation."""
    made_by = producers(model)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return [node.output[0] for node in nodes if node.input[0] in made_by]


def with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A copy that gives these values, float32 all of them, and nothing else."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return copy
