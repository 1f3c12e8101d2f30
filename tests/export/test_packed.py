"""The packed file: bit streams, exact round trips, sizes, every message."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_packed import Small, assert_equal, finalized, recipe
from torch import nn

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.errors import UserError
from qsam2.export.packed import (
    load_packed,
    model_bytes,
    pack_bits,
    packed_size,
    read_header,
    save_packed,
    unpack_bits,
)
from qsam2.layers.audit import audit
from qsam2.layers.convert import convert, finalize, quantizers
from qsam2.models import build_sam2
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
    stream = pack_bits(codes, bits)
    assert stream.dtype == torch.uint8 and stream.numel() == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, count), codes)
    # An independent reference: the bits of all codes in a row, least significant first.
    row = ((codes[:, None] >> torch.arange(bits)) & 1).flatten().numpy().astype(np.uint8)
    assert np.array_equal(stream.numpy(), np.packbits(row, bitorder="little"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_survive_packing(bits):
    codes = torch.full((19,), 2**bits - 1, dtype=torch.int32)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 19), codes.long())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("method", ["lsq", "lsc", "minmax"])
def test_a_loaded_model_is_the_finalized_one(tmp_path, bits, method):
    torch.manual_seed(bits)
    values, x = recipe(bits, method), torch.randn(2, 3, 6, 6)
    model = finalized(Small(), values)
    save_packed(tmp_path / "model.safetensors", model, values)
    loaded = Small().eval()
    rows = load_packed(tmp_path / "model.safetensors", loaded)
    assert_equal(loaded, model)
    assert torch.equal(loaded(x), model(x))
    audit(loaded, rows, QuantizeRecipe.model_validate(values["quantize"]), lambda: loaded(x))


@pytest.mark.parametrize("changes", [{"symmetric": False}, {"granularity": "tensor"}, {"grid": "mid_rise"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_grids_and_dtypes_survive(tmp_path, changes, dtype):
    torch.manual_seed(0)
    values, x = recipe(4, **changes), torch.randn(2, 3, 6, 6, dtype=dtype)
    model = finalized(Small(), values, dtype)
    save_packed(tmp_path / "model.safetensors", model, values)
    loaded = Small().to(dtype).eval()
    load_packed(tmp_path / "model.safetensors", loaded)
    assert_equal(loaded, model)
    assert torch.equal(loaded(x), model(x))


def test_zero_points_between_codes_survive_where_calibration_chose_the_grid(tmp_path):
    torch.manual_seed(0)
    values, x = recipe(2, "lsc"), torch.randn(2, 3, 6, 6)
    model = finalized(Small(), values)
    path = tmp_path / "model.safetensors"
    save_packed(path, model, values)
    chosen = [quantizer.grid.mid_rise for _, quantizer in quantizers(model) if quantizer.spec.grid == "least_error"]
    assert any(chosen), "no zero point lies between codes"
    loaded = Small().eval()
    load_packed(path, loaded)
    assert_equal(loaded, model)
    assert torch.equal(loaded(x), model(x))


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


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_weights_or_activations_alone_survive(tmp_path, part):
    torch.manual_seed(0)
    values, x = recipe(4), torch.randn(2, 3, 6, 6)
    values["quantize"] = {part: values["quantize"][part]}
    model = finalized(Small(), values)
    save_packed(tmp_path / "model.safetensors", model, values)
    loaded = Small().eval()
    load_packed(tmp_path / "model.safetensors", loaded)
    assert torch.equal(loaded(x), model(x))


def test_a_whole_sam2_survives(tmp_path):
    torch.manual_seed(0)
    spec = {"method": "minmax", "bits": 2}
    quantize = QuantizeRecipe.model_validate({"weights": spec})
    model = build_sam2("nano", image_size=64)
    convert(model, quantize)
    find_ranges(model, lambda batch: None, [])
    finalize(model)
    path = tmp_path / "model.safetensors"
    save_packed(path, model, {"quantize": quantize.model_dump(mode="json")})
    loaded = build_sam2("nano", image_size=64)
    load_packed(path, loaded)
    for (name, ours), (_, theirs) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs) or "quantizer." in name, name
    sizes = model_bytes(model)
    assert sizes["packed"] < sizes["bfloat16"] / 6 and sizes["float32"] == 2 * sizes["bfloat16"]


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
    with pytest.raises(UserError, match="could not be written: File exists"):
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


def rewrite(path: Path, change: Any) -> None:
    """Write a file again with changed tensors and metadata, its checksum of tensors as it was, the header's new."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    checksum = 0
    for key in ("extra", "recipe", "weights"):
        checksum = zlib.crc32(metadata[key].encode(), zlib.crc32(key.encode(), checksum))
    save_file(tensors, path, {**metadata, "header_crc32": str(checksum)})


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (Path.unlink, "does not exist; give the file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a packed model"),
    "foreign": (lambda path: path.write_text("a,b\n1,2\n"), "cannot be read as a packed model"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "cannot be read as a packed model"),
    "one bit": (_flip, "is damaged"),
    "no metadata": (lambda path: save_file({"a": torch.zeros(1)}, path), "is no packed model of qsam2"),
    "newer": (
        lambda path: rewrite(path, lambda metadata, _: metadata.update(version="3")),
        "has format version '3', this qsam2 reads 2: update qsam2, or export the model again",
    ),
    "broken header": (lambda path: rewrite(path, lambda metadata, _: metadata.update(weights="{")), "is damaged"),
    "odd header": (lambda path: rewrite(path, lambda metadata, _: metadata.update(extra="1")), "is damaged"),
    "no recipe": (
        lambda path: rewrite(path, lambda metadata, _: metadata.update(recipe="{}")),
        "made by a recipe that this version refuses: Input should be a valid",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_refused_in_one_line(saved, damage, message):
    path, _ = saved
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        load_packed(path, Small())
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_folder_is_no_packed_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_header(tmp_path)


def test_another_model_is_refused(saved):
    path, _ = saved
    other = Small()
    other.linear = nn.Linear(7, 4)
    with pytest.raises(UserError, match="other layers, shapes or bits; check model.size"):
        load_packed(path, other)
    other = Small()
    other.norm = nn.LayerNorm(8)
    with pytest.raises(UserError, match="norm.bias, norm.weight missing or of another shape"):
        load_packed(path, other)


def test_another_recipe_than_the_weights_is_refused(saved):
    path, _ = saved
    rewrite(path, lambda metadata, _: metadata.update(recipe=json.dumps(recipe(4))))
    with pytest.raises(UserError, match="other layers, shapes or bits"):
        load_packed(path, Small())
