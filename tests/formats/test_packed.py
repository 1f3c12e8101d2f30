"""The packed file: bit streams, exact round trips by us and by `docs/packed.md` alone, sizes, whole or not at all."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_packed import Small, assert_equal, finalized, recipe
from torch import nn

from qsam2.errors import UserError
from qsam2.formats.packed import (
    VERSION,
    load_packed,
    model_bytes,
    pack_bits,
    packed_size,
    read_header,
    save_packed,
    unpack_bits,
)
from qsam2.layers.audit import audit
from qsam2.layers.convert import quantized_weights, quantizers
from qsam2.loading import load_model
from qsam2.quantizers import QuantizerState
from qsam2.recipe.quantize import QuantizeRecipe

DOCUMENT = (Path(__file__).parents[2] / "docs" / "packed.md").read_text()
FILE = "model.safetensors"
Reader = Callable[[Path], tuple[dict[str, np.ndarray], dict[str, str]]]


@pytest.fixture(scope="module")
def read_packed() -> Reader:
    """The document's code; it may import nothing of qsam2."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    imports = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    assert imports == {"json", "struct", "zlib", "numpy"}
    names: dict[str, Any] = {}
    exec(compile(code, "docs/packed.md", "exec"), names)
    return names["read_packed"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = finalized(Small(), recipe(3))
    save_packed(tmp_path / FILE, model, recipe(3), {"score": 1.5})
    return tmp_path / FILE, model


@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 2**31))
@settings(max_examples=150)
def test_bits_survive_packing(bits, count, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count))
    codes[::7] = 2**bits - 1
    stream = pack_bits(codes, bits)
    assert stream.dtype == torch.uint8 and stream.numel() == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, count), codes)
    # An independent reference: the bits of all codes in a row, least significant first.
    row = ((codes[:, None] >> torch.arange(bits)) & 1).flatten().numpy().astype(np.uint8)
    assert np.array_equal(stream.numpy(), np.packbits(row, bitorder="little"))


def check_arrays(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """All of the state dict, bit for bit; of quantizers what they compute with."""
    weights = {f"{name}.weight" for name, _, _ in quantized_weights(model)}
    state = {name: tensor for name, tensor in model.state_dict().items() if "quantizer." not in name}
    assert weights < state.keys() == {name for name in arrays if "quantizer." not in name}
    for name, tensor in state.items():
        assert torch.equal(torch.from_numpy(arrays[name].astype("f4")).to(tensor.dtype), tensor), name
    for name, _, quantizer in quantized_weights(model):
        assert np.array_equal(arrays[f"{name}.weight_quantizer.scale"], quantizer.scale.numpy())


def round_trip(file: Path, reader: Reader, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The finalized model, after checks that what is loaded equals it and computes the same."""
    model, x = finalized(Small(), values, dtype), torch.randn(2, 3, 6, 6, dtype=dtype)
    save_packed(file, model, values, {"score": 1.5})
    loaded = Small().to(dtype).eval()
    rows = load_packed(file, loaded)
    assert_equal(loaded, model)
    assert torch.equal(loaded(x), model(x))
    if "weights" in values["quantize"]:
        audit(loaded, rows, QuantizeRecipe.model_validate(values["quantize"]), lambda: loaded(x))
    arrays, texts = reader(file)
    check_arrays(model, arrays)
    assert texts["extra"] == '{"score": 1.5}' and texts["version"] == str(VERSION)
    return model


METHODS = [(bits, {"method": method}) for method in ("lsq", "lsc", "minmax") for bits in range(2, 9)]
OPTIONS = ({"symmetric": False}, {"granularity": "tensor"}, {"grid": "mid_rise"})
ROUND_TRIPS = [
    *((bits, changes, torch.float32) for bits, changes in METHODS),
    *((bits, changes, torch.float32) for changes in OPTIONS for bits in (2, 3, 4, 8)),
    *((4, changes, torch.bfloat16) for changes in ({}, *OPTIONS)),
]


@pytest.mark.parametrize(("bits", "changes", "dtype"), ROUND_TRIPS, ids=str)
def test_a_loaded_model_is_the_finalized_one(tmp_path, read_packed, bits, changes, dtype):
    torch.manual_seed(bits)
    round_trip(tmp_path / FILE, read_packed, recipe(bits, **changes), dtype)


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_weights_or_activations_alone_survive(tmp_path, read_packed, part):
    values = recipe(4)
    round_trip(tmp_path / FILE, read_packed, {**values, "quantize": {part: values["quantize"][part]}})


def test_zero_points_between_codes_survive(tmp_path, read_packed):
    model = round_trip(tmp_path / FILE, read_packed, recipe(2, "lsc"))
    assert any(quantizer.grid.mid_rise for _, quantizer in quantizers(model) if quantizer.spec.grid == "least_error")


@pytest.mark.parametrize(
    ("method", "zero_point"), [("lsc", 0.25), ("lsc", 3.5), ("lsc", -0.5), ("minmax", 0.5), ("minmax", 4.0)]
)
def test_zero_points_that_none_can_have_are_refused(tmp_path, method, zero_point):
    model = finalized(Small(), recipe(2, method))
    activations = [each for _, each in quantizers(model) if each.role == "activation" and each.bits == 2]
    activations[0].frozen_zero_point.fill_(zero_point)
    save_packed(tmp_path / FILE, model, recipe(2, method))
    with pytest.raises(UserError, match="has a scale or zero point that none can have"):
        load_packed(tmp_path / FILE, Small())


def test_the_header_and_the_size_are_what_is_inside(saved):
    path, model = saved
    header, stored = read_header(path), load_file(path)
    assert header["recipe"] == recipe(3) and header["extra"] == {"score": 1.5}
    up = {"bits": 3, "qmin": -4, "channel_dim": 1, "shape": [5, 7, 2, 2], "dtype": "float32"}
    assert header["weights"]["up"] == up
    sizes = {"conv": 135, "depthwise": packed_size(45, 5), "up": packed_size(140, 3), "linear": packed_size(21, 3)}
    assert header["weights"].keys() == sizes.keys()
    packed = {name: tensor.nbytes for name, tensor in stored.items() if name.endswith(".packed")}
    assert packed == {f"{name}.weight.packed": size for name, size in sizes.items()}
    assert model_bytes(model)["packed"] == sum(tensor.nbytes for tensor in stored.values())
    values = sum(tensor.numel() for tensor in Small().state_dict().values())
    assert model_bytes(Small()) == {"float32": 4 * values, "bfloat16": 2 * values, "packed": 4 * values}
    assert model_bytes(model)["float32"] == 4 * values


def test_the_worked_example() -> None:
    rows = {key: re.search(rf"^    {key} +(.*)$", DOCUMENT, flags=re.MULTILINE) for key in ("integers", "less qmin")}
    integers, codes = ([int(number) for number in row.group(1).split()] for row in rows.values() if row)
    assert [integer + 4 for integer in integers] == codes and len(codes) == 5
    written = re.search(r"in hexadecimal +(.*)", DOCUMENT)
    assert written and bytes(pack_bits(torch.tensor(codes), 3).tolist()) == bytes.fromhex(written.group(1))


def test_the_document_reads_a_whole_model(read_packed, models):
    path = models["packed"] / FILE
    check_arrays(load_model(path)[0], read_packed(path)[0])


def test_the_document_notices_a_damaged_file(saved, read_packed):
    path, _ = saved
    data = path.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data.replace(b"test", b"tesd", 1)):
        path.write_bytes(damaged)
        with pytest.raises(AssertionError, match="damaged"):
            read_packed(path)


def test_a_file_replaces_the_former_one_when_it_is_whole(saved, monkeypatch):
    path, model = saved
    before, new = path.read_bytes(), path.parent / "new" / FILE
    with pytest.raises(UserError, match="could not be written"):
        save_packed(path / FILE, model, recipe(3))  # a file is no folder
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="could not be written: disk full"):
        save_packed(path, model, recipe(3))
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.undo()
    save_packed(new, model, recipe(3))  # a missing folder is made
    assert new.is_file()


def test_a_model_that_is_not_finalized_is_refused(saved, tmp_path):
    _, model = saved
    with torch.no_grad():
        model.linear.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="linear.weight is not its own integers: finalize"):
        save_packed(tmp_path / "other", model, recipe(3))
    model.linear.input_quantizer.state = QuantizerState.QUANTIZE
    with pytest.raises(RuntimeError, match="linear.input_quantizer is QUANTIZE: finalize"):
        save_packed(tmp_path / "other", model, recipe(3))


def test_another_model_is_refused(saved, message):
    for name, layer, fact in (
        ("linear", nn.Linear(7, 4), "model.size"),
        ("norm", nn.LayerNorm(8), "norm.bias, norm.weight"),
    ):
        other = Small()
        setattr(other, name, layer)
        with pytest.raises(UserError) as error:
            load_packed(saved[0], other)
        assert fact in message(error)
