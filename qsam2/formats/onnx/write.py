"""Export of a model as five ONNX graphs and `model.json`, which describes how a tracker combines them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qsam2.data.transforms import MEAN, STD
from qsam2.errors import UserError
from qsam2.formats.onnx.graphs import Graph, build_graphs
from qsam2.formats.onnx.grids import narrow, translations
from qsam2.formats.onnx.runtime import FORMAT, VERSION
from qsam2.models import SAM2
from qsam2.output import version, write_bytes, write_text, writing

OPSET = 21
"""First opset with 4-bit integers in QuantizeLinear and DequantizeLinear."""
NOISY = ("torch.onnx", "torch.export", "torch.__trace", "onnxscript", "onnx_ir")
"""Loggers of the exporter's internals."""


def export_onnx(
    model: SAM2,
    recipe: Mapping[str, Any],
    folder: Path,
    *,
    card: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write a float or finalized model into a folder: five NAME.onnx, then `model.json`; returns the bytes per file.

    Computes in float32; nothing is calibrated or rounded anew.

    Args:
        recipe, card: plain values, copied into `model.json`.

    Raises:
        UserError: the extra `onnx` is missing, or a file cannot be written.
    """
    require_packages()
    graphs = build_graphs(model)
    with writing(folder):
        (folder / "model.json").unlink(missing_ok=True)  # absent until all files are of one model
    files: dict[str, dict[str, Any]] = {}
    bar = tqdm(graphs.items(), "ONNX graphs", disable=not progress)
    for name, graph in bar:
        bar.set_postfix_str(name)
        data = graph_bytes(graph)
        write_bytes(folder / f"{name}.onnx", data)
        files[f"{name}.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    description = describe(model) | {"files": files, "recipe": dict(recipe), "card": card}
    write_text(folder / "model.json", json.dumps(description, indent=1))
    return {name: file["bytes"] for name, file in files.items()}


def require_packages() -> None:
    """Raises UserError if the extra `onnx` is not installed."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX export needs {', '.join(missing)}: pip install 'qsam2[onnx]'")


def describe(model: SAM2) -> dict[str, Any]:
    """Properties of a model that a tracker needs besides its graphs."""
    decoder = model.sam_mask_decoder
    threshold = decoder.dynamic_multimask_stability_thresh if decoder.dynamic_multimask_via_stability else 0.0
    return {
        "format": FORMAT,
        "version": VERSION,
        "qsam2": version(),
        "opset": OPSET,
        "image_size": model.image_size,
        "mean": MEAN,
        "std": STD,
        "memory_slots": model.num_maskmem,
        "memory_channels": model.mem_dim,
        "channels": model.hidden_dim,
        "pointers": model.max_obj_ptrs_in_encoder,
        "binarize_prompted_masks": model.binarize_mask_from_pts_for_mem_enc,
        "choices_from_points": [model.multimask_min_pt_num, model.multimask_max_pt_num],
        "choices_while_tracking": model.multimask_output_for_tracking,
        "stability_delta": decoder.dynamic_multimask_stability_delta,
        "stability_threshold": threshold,
    }


@torch.inference_mode()
def graph_bytes(graph: Graph) -> bytes:
    """A graph as the content of an ONNX file, checked by `onnx.checker`, without paths of source files."""
    import onnx

    graph.module(*graph.inputs.values())  # fills sam2's caches of position encodings before tracing
    with _quiet():
        program = torch.onnx.export(
            graph.module.eval(),
            kwargs=dict(graph.inputs),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes={name: graph.dynamic.get(name) for name in graph.inputs},
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    narrow(program.model)
    nodes = program.model.graph
    for item in (*nodes, *nodes.initializers.values(), *nodes.inputs):
        item.metadata_props.clear()  # names of source files, most of the bytes
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the exporter about its own code."""
    levels = {logger: logger.level for logger in map(logging.getLogger, NOISY)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
