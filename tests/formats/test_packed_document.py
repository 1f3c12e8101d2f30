"""`docs/packed.md` alone is enough to read a packed file: its code, NumPy and the standard library."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_packed import Small, finalized, recipe
from torch import nn

from qsam2.formats.packed import VERSION, pack_bits, save_packed
from qsam2.layers.convert import quantized_weights
from qsam2.loading import load_model

DOCUMENT = (Path(__file__).parents[2] / "docs" / "packed.md").read_text()


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """Names that the document's code defines; it may import nothing of qsam2."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    imports = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    assert imports == {"json", "struct", "zlib", "numpy"}
    names: dict[str, Any] = {}
    exec(compile(code, "docs/packed.md", "exec"), names)
    return names


def check(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """All of the state dict, bit for bit; of quantizers what they compute with."""
    weights = {f"{name}.weight" for name, _, _ in quantized_weights(model)}
    state = {name: tensor.float() for name, tensor in model.state_dict().items() if "quantizer." not in name}
    assert weights < state.keys() == {name for name in arrays if "quantizer." not in name}
    for name, tensor in state.items():
        assert np.array_equal(torch.from_numpy(arrays[name].astype("f4")).to(tensor.dtype).numpy(), tensor.numpy())
    for name, _, quantizer in quantized_weights(model):
        assert np.array_equal(arrays[f"{name}.weight_quantizer.scale"], quantizer.scale.numpy())


@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"granularity": "tensor"}, {"grid": "mid_rise"}])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_document_reads_all_grids(
    bits: int, changes: dict[str, Any], reader: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    values = recipe(bits, **changes)
    model = finalized(Small(), values)
    save_packed(tmp_path / "model.safetensors", model, values, {"score": 1.5})
    arrays, texts = reader["read_packed"](tmp_path / "model.safetensors")
    check(model, arrays)
    assert texts["extra"] == '{"score": 1.5}' and texts["version"] == str(VERSION)


def test_the_document_reads_bfloat16(reader: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = recipe(4)
    model = finalized(Small(), values, torch.bfloat16)
    save_packed(tmp_path / "model.safetensors", model, values)
    arrays, _ = reader["read_packed"](tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if "quantizer." not in name:
            assert torch.equal(torch.from_numpy(arrays[name].copy()).to(torch.bfloat16), tensor.bfloat16()), name


def test_the_document_reads_a_whole_model(reader: dict[str, Any], models: dict[str, Path]) -> None:
    path = models["packed"] / "model.safetensors"
    check(load_model(path)[0], reader["read_packed"](path)[0])


def test_a_damaged_file_is_noticed(reader: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = recipe(3)
    path = tmp_path / "model.safetensors"
    save_packed(path, finalized(Small(), values), values)
    data = path.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data.replace(b"test", b"tesd", 1)):
        path.write_bytes(damaged)
        with pytest.raises(AssertionError, match="damaged"):
            reader["read_packed"](path)


def test_the_worked_example() -> None:
    rows = {key: re.search(rf"^    {key} +(.*)$", DOCUMENT, flags=re.MULTILINE) for key in ("integers", "less qmin")}
    integers, codes = ([int(number) for number in row.group(1).split()] for row in rows.values() if row)
    assert [integer + 4 for integer in integers] == codes and len(codes) == 5
    written = re.search(r"in hexadecimal +(.*)", DOCUMENT)
    assert written and bytes(pack_bits(torch.tensor(codes), 3).tolist()) == bytes.fromhex(written.group(1))
