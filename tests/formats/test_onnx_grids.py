"""Every grid in ONNX gives what our quantizer gives, bit for bit; what ONNX lacks is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_engines import session
from torch import Tensor, nn

from qsam2.formats.onnx.graphs import Graph
from qsam2.formats.onnx.grids import use_onnx_grids
from qsam2.formats.onnx.write import OPSET, graph_bytes
from qsam2.layers.weight import QuantConvTranspose2d, QuantLinear
from qsam2.quantizers import Quantizer, build_quantizer
from qsam2.recipe.quantizer_specs import MinMaxSpec

BITS = range(2, 9)
ACTIVATIONS = [
    *({"bits": bits, "symmetric": symmetric} for bits in BITS for symmetric in (True, False)),
    *({"bits": bits, "grid": "mid_rise"} for bits in BITS),
    *({"bits": bits, "grid": "least_error"} for bits in BITS),
]
WEIGHTS = [
    *({"bits": bits, "symmetric": symmetric, "grid": "mid_tread"} for bits in BITS for symmetric in (True, False)),
    *({"bits": bits, "grid": "mid_rise"} for bits in BITS),
    {"bits": 4, "granularity": "tensor"},
]


def frozen(spec: dict[str, Any], role: str, values: Tensor, **options: int) -> Quantizer:
    quantizer = build_quantizer(MinMaxSpec(**spec), role, **options)
    quantizer.initialize_from(values)
    quantizer.eval().freeze()
    return quantizer


class Grids(nn.Module):
    """All grids side by side: the same activation on each, then the weight of each layer."""

    def __init__(self) -> None:
        super().__init__()
        seen = torch.rand(64) * 3 - 1
        self.activations = nn.ModuleList(frozen(spec, "activation", seen) for spec in ACTIVATIONS)
        self.layers = nn.ModuleList(QuantLinear.from_float(nn.Linear(6, 5)) for _ in WEIGHTS)
        self.layers.append(QuantConvTranspose2d.from_float(nn.ConvTranspose2d(3, 5, 2)))
        for spec, layer in zip([*WEIGHTS, {"bits": 4}], self.layers, strict=True):
            options = {"num_channels": 5, "channel_dim": layer.channel_dim}
            layer.weight_quantizer = frozen(spec, "weight", layer.weight, **options)
            layer.weight.data.copy_(layer.weight_quantizer(layer.weight))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            *(quantizer(x) for quantizer in self.activations),
            *(layer.weight_quantizer(layer.weight) + 0 * x.sum() for layer in self.layers),
        )


@pytest.fixture(scope="module")
def exported() -> tuple[tuple[Tensor, ...], onnx.ModelProto, Tensor]:
    grids = Grids().eval()
    # Ties, and the borders of the clipped ranges.
    scales = torch.stack([quantizer.scale for quantizer in grids.activations])  # (grids, 1)
    x = torch.cat([torch.randn(4000) * 2, (scales * (torch.arange(-300, 300) / 2)).flatten()])
    with torch.no_grad():
        expected = grids(x)
    use_onnx_grids(grids)
    graph = Graph(grids, {"x": x}, tuple(f"y{index}" for index in range(len(expected))))
    return expected, onnx.load_from_string(graph_bytes(graph)), x


def test_integers_are_those_of_the_quantizers(exported):
    expected, model, x = exported
    found = session(model).run(None, {"x": x.numpy()})
    for spec, ours, theirs in zip([*ACTIVATIONS, *WEIGHTS, "transposed"], expected, found, strict=True):
        assert np.array_equal(ours.numpy(), theirs), spec


def test_weights_take_as_many_bits_as_onnx_has(exported):
    _, model, _ = exported
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    types = onnx.TensorProto
    for index, spec in enumerate([*WEIGHTS, {"bits": 4}]):
        bits, signed = spec["bits"] + (spec.get("grid") == "mid_rise"), spec.get("symmetric", True)
        if bits <= 4:
            suffix, width, wanted = ".codes_4bit.0", 4, types.INT4 if signed else types.UINT4
        elif bits <= 8:
            suffix, width, wanted = ".codes", 8, types.INT8 if signed else types.UINT8
        else:
            suffix, width, wanted = ".codes", 16, types.INT16
        tensor = stored[f"layers.{index}.weight_quantizer{suffix}"]
        assert tensor.data_type == wanted and len(tensor.raw_data) == -(-np.prod(tensor.dims) * width // 8), spec
    assert not any("weight_quantizer" not in name and "weight" in name for name in stored), "a float weight is left"
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert b".py" not in model.SerializeToString(), "a path of this machine"
