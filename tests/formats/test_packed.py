"""The packed file: bit streams, exact round trips, sizes, writing whole or not at all."""

from __future__ import annotations

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
    load_packed,
    model_bytes,
    pack_bits,
    packed_size,
    read_header,
    save_packed,
    unpack_bits,
)
from qsam2.layers.audit import audit
from qsam2.layers.convert import quantizers
from qsam2.quantizers import QuantizerState
from qsam2.recipe.quantize import QuantizeRecipe


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    values = recipe(3)
    model = finalized(Small(), values)
    save_packed(tmp_path / "model.safetensors", model, values, {"score": 1.5})
    return tmp_path / "model.safetensors", model


@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_bits_survive_packing(bits, count, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count))
    codes[::7] = 2**bits - 1
    stream = pack_bits(codes, bits)
    assert stream.dtype == torch.uint8 and stream.numel() == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, count), codes)
    # An independent reference: the bits of all codes in a row, least significant first.
    row = ((codes[:, None] >> torch.arange(bits)) & 1).flatten().numpy().astype(np.uint8)
    assert np.array_equal(stream.numpy(), np.packbits(row, bitorder="little"))


ROUND_TRIPS: dict[str, tuple[int, dict[str, Any], torch.dtype]] = {
    **{
        f"{method}-{bits}": (bits, {"method": method}, torch.float32)
        for method in ("lsq", "lsc", "minmax")
        for bits in range(2, 9)
    },
    **{
        f"{key}={value}-{str(dtype).rpartition('.')[2]}": (4, {key: value}, dtype)
        for key, value in (("symmetric", False), ("granularity", "tensor"), ("grid", "mid_rise"))
        for dtype in (torch.float32, torch.bfloat16)
    },
}


def round_trip(folder: Path, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The finalized model, after a check that what is loaded equals it and computes the same."""
    model, x = finalized(Small(), values, dtype), torch.randn(2, 3, 6, 6, dtype=dtype)
    save_packed(folder / "model.safetensors", model, values)
    loaded = Small().to(dtype).eval()
    rows = load_packed(folder / "model.safetensors", loaded)
    assert_equal(loaded, model)
    assert torch.equal(loaded(x), model(x))
    if "weights" in values["quantize"]:
        audit(loaded, rows, QuantizeRecipe.model_validate(values["quantize"]), lambda: loaded(x))
    return model


@pytest.mark.parametrize(("bits", "changes", "dtype"), ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_a_loaded_model_is_the_finalized_one(tmp_path, bits, changes, dtype):
    torch.manual_seed(bits)
    round_trip(tmp_path, recipe(bits, **changes), dtype)


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_weights_or_activations_alone_survive(tmp_path, part):
    torch.manual_seed(0)
    values = recipe(4)
    values["quantize"] = {part: values["quantize"][part]}
    round_trip(tmp_path, values)


def test_zero_points_between_codes_survive(tmp_path):
    torch.manual_seed(0)
    model = round_trip(tmp_path, recipe(2, "lsc"))
    assert any(quantizer.grid.mid_rise for _, quantizer in quantizers(model) if quantizer.spec.grid == "least_error")


@pytest.mark.parametrize(
    ("method", "zero_point"), [("lsc", 0.25), ("lsc", 3.5), ("lsc", -0.5), ("minmax", 0.5), ("minmax", 4.0)]
)
def test_zero_points_that_none_can_have_are_refused(tmp_path, method, zero_point):
    values = recipe(2, method)
    model = finalized(Small(), values)
    activations = [each for _, each in quantizers(model) if each.role == "activation" and each.bits == 2]
    activations[0].frozen_zero_point.fill_(zero_point)
    save_packed(tmp_path / "model.safetensors", model, values)
    with pytest.raises(UserError, match="has a scale or zero point that none can have"):
        load_packed(tmp_path / "model.safetensors", Small())


def test_the_header_says_what_is_inside(saved):
    path, _ = saved
    header = read_header(path)
    assert header.recipe == recipe(3) and header.extra == {"score": 1.5}
    assert header.weights["up"] == {"bits": 3, "qmin": -4, "channel_dim": 1, "shape": [5, 7, 2, 2], "dtype": "float32"}
    assert header.weights.keys() == {"conv", "depthwise", "up", "linear"}


def test_the_size_is_what_the_bits_say(saved):
    path, model = saved
    stored = load_file(path)
    assert model_bytes(model)["packed"] == sum(tensor.nbytes for tensor in stored.values())
    weights = {name: tensor.nbytes for name, tensor in stored.items() if name.endswith(".packed")}
    assert weights == {
        "conv.weight.packed": 135,
        "depthwise.weight.packed": packed_size(45, 5),
        "up.weight.packed": packed_size(140, 3),
        "linear.weight.packed": packed_size(21, 3),
    }
    values = sum(tensor.numel() for tensor in Small().state_dict().values())
    assert model_bytes(Small()) == {"float32": 4 * values, "bfloat16": 2 * values, "packed": 4 * values}
    assert model_bytes(model)["float32"] == 4 * values


def test_integers_can_be_read_by_the_description_alone(saved):
    path, model = saved
    stored, (name, layer) = load_file(path), ("up", read_header(path).weights["up"])
    row = np.unpackbits(stored[f"{name}.weight.packed"].numpy(), bitorder="little")[: 140 * 3].reshape(-1, 3)
    codes = (row * [1, 2, 4]).sum(axis=1).reshape(layer["shape"]) + layer["qmin"]
    scale, zero_point = (stored[f"{name}.weight_quantizer.{key}"].numpy() for key in ("scale", "zero_point"))
    weight = (codes - zero_point).astype(np.float32) * scale.reshape(1, -1, 1, 1)
    assert np.array_equal(weight, model.up.weight.detach().numpy())


def test_a_file_replaces_the_former_one_when_it_is_whole(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="could not be written: disk full"):
        save_packed(path, model, recipe(3))
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_folder_is_made_and_an_impossible_one_is_a_users_mistake(saved, tmp_path):
    save_packed(tmp_path / "new" / "model.safetensors", saved[1], recipe(3))
    assert (tmp_path / "new" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="could not be written"):
        save_packed(saved[0] / "model.safetensors", saved[1], recipe(3))


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
    path, _ = saved
    other = Small()
    other.linear = nn.Linear(7, 4)
    with pytest.raises(UserError) as error:
        load_packed(path, other)
    assert "model.size" in message(error)
    other = Small()
    other.norm = nn.LayerNorm(8)
    with pytest.raises(UserError) as error:
        load_packed(path, other)
    assert "norm.bias, norm.weight" in message(error)
