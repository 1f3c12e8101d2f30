"""Every grid in ONNX gives what our quantizer gives, bit for bit; what ONNX lacks is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
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


def frozen(quantizer: Quantizer, seen: Tensor) -> Quantizer:
    quantizer.initialize_from(seen)
    quantizer.eval().freeze()
    return quantizer


class Grids(nn.Module):
    """All grids side by side: the same activation on each, then the weight of each layer."""

    def __init__(self) -> None:
        super().__init__()
        seen = torch.rand(64) * 3 - 1
        self.activations = nn.ModuleList(
            frozen(build_quantizer(MinMaxSpec(**spec), "activation"), seen) for spec in ACTIVATIONS
        )
        self.layers = nn.ModuleList()
        for spec in WEIGHTS:
            layer = QuantLinear.from_float(nn.Linear(6, 5))
            layer.weight_quantizer = build_quantizer(MinMaxSpec(**spec), "weight", num_channels=5)
            self.layers.append(layer)
        up = QuantConvTranspose2d.from_float(nn.ConvTranspose2d(3, 5, 2))
        up.weight_quantizer = build_quantizer(MinMaxSpec(bits=4), "weight", num_channels=5, channel_dim=1)
        self.layers.append(up)
        for layer in self.layers:
            frozen(layer.weight_quantizer, layer.weight)
            layer.weight.data.copy_(layer.weight_quantizer(layer.weight))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            *(quantizer(x) for quantizer in self.activations),
            *(layer.weight_quantizer(layer.weight) + 0 * x.sum() for layer in self.layers),
        )


@pytest.fixture(scope="module")
def exported() -> tuple[tuple[Tensor, ...], onnx.ModelProto, Tensor, Grids]:
    torch.manual_seed(0)
    grids, x = Grids().eval(), torch.randn(4000) * 2
    # Ties, and the borders of the clipped ranges.
    scales = torch.stack([quantizer.scale for quantizer in grids.activations])  # (grids, 1)
    x = torch.cat([x, (scales * (torch.arange(-300, 300) / 2)).flatten()])
    with torch.no_grad():
        expected = grids(x)
    use_onnx_grids(grids)
    graph = Graph(grids, {"x": x}, tuple(f"y{index}" for index in range(len(expected))), {})
    return expected, onnx.load_from_string(graph_bytes(graph)), x, grids


def test_integers_are_those_of_the_quantizers(exported):
    expected, model, x, _ = exported
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})
    for spec, ours, theirs in zip([*ACTIVATIONS, *WEIGHTS, "transposed"], expected, found, strict=True):
        assert np.array_equal(ours.numpy(), theirs), spec


def test_weights_take_as_many_bits_as_onnx_has(exported):
    _, model, _, grids = exported
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    types = onnx.TensorProto
    for index, spec in enumerate([*WEIGHTS, {"bits": 4}]):
        bits, mid_rise = spec["bits"], spec.get("grid") == "mid_rise"
        signed = spec.get("symmetric", True)
        if bits + mid_rise <= 4:
            name, wanted = f"layers.{index}.weight_quantizer.codes_4bit.0", types.INT4 if signed else types.UINT4
        else:
            name = f"layers.{index}.weight_quantizer.codes"
            wanted = types.INT16 if bits + mid_rise > 8 else types.INT8 if signed else types.UINT8
        tensor = stored[name]
        assert tensor.data_type == wanted, spec
        bits_of = {types.INT4: 4, types.UINT4: 4, types.INT16: 16}.get(wanted, 8)
        assert len(tensor.raw_data) == -(-np.prod(tensor.dims) * bits_of // 8), spec
    assert not any("weight_quantizer" not in name and "weight" in name for name in stored), "a float weight is left"


def test_the_opset_is_stated_and_no_path_of_this_machine(exported):
    _, model, _, _ = exported
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert b".py" not in model.SerializeToString()
