"""A packed file may come from anywhere: damaged or forged, it is refused in one line; nothing in it is run."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import Message
from safetensors.torch import save_file
from small_packed import Small, assert_equal, finalized, recipe
from torch import nn

from qsam2.errors import UserError
from qsam2.formats.packed import load_packed, read_header, save_packed
from qsam2.loading import load_model

MUTATED, FORGED = 1000, 300
GROWTH_MB = 300
"""Memory that reading all of them may take."""
ODD: tuple[Any, ...] = (
    0, -1, 1, 7, 64, 2**31, 2**62, 2**63, 2**64 - 1, 2**80, 1e308, 0.5, None, True, "", "x", "\n", [], {}, [-1, 2],
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "U8", "I8", "I64", "U64", "BOOL", "F8_E4M3", "F4", "C64", "X9", "")


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def crc(parts: dict[str, bytes]) -> str:
    checksum = 0
    for name in sorted(parts):
        checksum = zlib.crc32(parts[name], zlib.crc32(name.encode(), checksum))
    return str(checksum)


def forged(header: dict[str, Any], body: bytes) -> bytes:
    """A file with checksums that fit, as an attacker would write it."""
    header = copy.deepcopy(header)
    metadata = header.get("__metadata__", {})
    texts = {key: str(metadata[key]).encode() for key in ("extra", "recipe", "weights") if key in metadata}
    contents = {}
    for name, tensor in header.items():
        offsets = tensor.get("data_offsets") if name != "__metadata__" and isinstance(tensor, dict) else None
        if isinstance(offsets, list) and all(isinstance(offset, int) for offset in offsets):
            contents[name] = body[slice(*offsets[:2])]
    header["__metadata__"] = {**metadata, "header_crc32": crc(texts), "crc32": crc(contents)}
    return join(header, body)


# Mutations


def flip(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    changed = bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    for _count in range(rng.integers(1, 9)):
        limit = [8, 8 + length, len(data)][rng.integers(3)]  # in the length, the header, anywhere
        changed[rng.integers(limit)] ^= 1 << rng.integers(8)
    return bytes(changed)


def cut(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    return data[: rng.integers(len(data))]


def lengthen(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    at = rng.integers(len(data) + 1)
    return data[:at] + rng.bytes(int(rng.integers(1, 100))) + data[at:]


def splice(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """A piece of another packed file, or of this one, in another place."""
    source = [data, other][rng.integers(2)]
    start, at, length = rng.integers(len(source)), rng.integers(len(data)), rng.integers(1, 500)
    return data[:at] + source[start : start + length] + data[at + length :]


def change_header(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    header, body = split(data)
    return join(changed_header(header, rng, split(other)[0]), body)


def changed_header(header: dict[str, Any], rng: np.random.Generator, other: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    name, second = (str(one) for one in rng.choice(names, 2, replace=False))
    metadata = header["__metadata__"]
    key = str(rng.choice(sorted(metadata)))
    match rng.integers(10):
        case 0:
            header[name]["dtype"] = str(rng.choice(DTYPES))
        case 1:
            header[name]["shape"] = [ODD[i] for i in rng.integers(len(ODD), size=rng.integers(4))]
        case 2:
            header[name]["data_offsets"] = [ODD[i] for i in rng.integers(len(ODD), size=2)]
        case 3:
            header[name], header[second] = header[second], header[name]
        case 4:
            del header[name]
        case 5:
            header[name + "x"] = header.pop(name)
        case 6:
            del metadata[key]
        case 7:
            metadata[key] = other["__metadata__"][key] if rng.integers(2) else str(ODD[rng.integers(len(ODD))])
        case 8:
            header["__metadata__"] = ODD[rng.integers(len(ODD))]
        case _:
            key = str(rng.choice(["recipe", "weights", "extra"]))
            metadata[key] = json.dumps(changed_value(json.loads(metadata[key]), rng))
    return header


def changed_value(value: Any, rng: np.random.Generator) -> Any:
    """The nested values with one value replaced at random."""
    if isinstance(value, dict) and value and rng.integers(5):
        key = str(rng.choice(sorted(value)))
        return {**value, key: changed_value(value[key], rng)}
    if isinstance(value, list) and value and rng.integers(5):
        at = int(rng.integers(len(value)))
        return [*value[:at], changed_value(value[at], rng), *value[at + 1 :]]
    return ODD[rng.integers(len(ODD))]


MUTATIONS = (flip, cut, lengthen, splice, change_header, change_header)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, nn.Module]:
    """A packed file, another one, and the first one's model."""
    folder = tmp_path_factory.mktemp("packed")
    models = []
    for seed, bits in enumerate((3, 4)):
        torch.manual_seed(seed)
        models.append(finalized(Small(), recipe(bits)))
        save_packed(folder / str(seed), models[-1], recipe(bits), {"score": 1.5})
    return (folder / "0").read_bytes(), (folder / "1").read_bytes(), models[0]


def outcome(path: Path, data: bytes) -> nn.Module | None:
    """The model of a file, None where it was refused as it should be."""
    path.write_bytes(data)
    loaded = Small().eval()
    try:
        load_packed(path, loaded)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 1000
        return None
    return loaded


def test_a_thousand_mutated_files_are_refused_or_equal(saved: tuple[bytes, bytes, nn.Module], tmp_path: Path) -> None:
    data, other, model = saved
    original = tmp_path / "original.safetensors"
    original.write_bytes(data)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    refused = 0
    for seed in range(MUTATED):
        rng = np.random.default_rng(seed)
        mutated = MUTATIONS[seed % len(MUTATIONS)](data, rng, other)
        loaded = outcome(tmp_path / "mutated.safetensors", mutated)
        refused += loaded is None
        if loaded is not None:
            assert_equal(loaded, model)
            assert read_header(tmp_path / "mutated.safetensors") == read_header(original)
    assert refused > 0.9 * MUTATED  # the rest changed nothing that counts
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 < before_mb + GROWTH_MB


def test_forged_files_with_right_checksums_do_no_harm(saved: tuple[bytes, bytes, nn.Module], tmp_path: Path) -> None:
    """A forged file that loads is a sound model, if not the same one."""
    data, other, _ = saved
    x, loaded = torch.randn(1, 3, 6, 6), 0
    for seed in range(FORGED):
        rng = np.random.default_rng(seed)
        header, body = split(data)
        if seed % 2:
            header = changed_header(header, rng, split(other)[0])
            if not isinstance(header.get("__metadata__"), dict):
                header["__metadata__"] = {}
        else:
            changed = np.frombuffer(body, np.uint8).copy()
            changed[rng.integers(len(body), size=3)] ^= rng.integers(1, 256, size=3, dtype=np.uint8)
            body = changed.tobytes()
        model = outcome(tmp_path / "forged.safetensors", forged(header, body))
        loaded += model is not None
        if model is not None:
            assert isinstance(model(x), torch.Tensor)
    assert 0.1 * FORGED < loaded < 0.9 * FORGED


# What a forger would try, by the way that all models are loaded


@pytest.fixture(scope="module")
def packed(models: dict[str, Path]) -> bytes:
    """Packed file of a nano with random weights."""
    return (models["packed"] / "model.safetensors").read_bytes()


Forge = Callable[[bytes], bytes]


def with_header(change: Callable[[dict[str, Any], int], object]) -> Forge:
    """`change(header, bytes of the body)`, and checksums that fit."""

    def forge(data: bytes) -> bytes:
        header, body = split(data)
        change(header, len(body))
        return forged(header, body)

    return forge


def with_tensor(**values: Any) -> Forge:
    """The first tensor with another description."""
    return with_header(lambda header, _: next(header[name] for name in header if name[0] != "_").update(values))


def with_more(**tensor: Any) -> Forge:
    """One more tensor behind all others."""
    begin, end = tensor.pop("data_offsets", (0, 0))
    return with_header(lambda header, size: header.update(more={**tensor, "data_offsets": [size + begin, size + end]}))


def with_text(key: str, text: str) -> Forge:
    return with_header(lambda header, _: header["__metadata__"].update({key: text}))


def with_values(key: str, change: Callable[[dict[str, Any]], object]) -> Forge:
    """Changed values in one of the header's JSON texts."""

    def change_header(header: dict[str, Any], _: int) -> None:
        values = json.loads(header["__metadata__"][key])
        change(values)
        header["__metadata__"][key] = json.dumps(values)

    return with_header(change_header)


def with_recipe(change: Callable[[dict[str, Any]], object]) -> Forge:
    return with_values("recipe", change)


def with_bits(bits: int) -> Forge:
    return with_recipe(lambda values: values["quantize"]["weights"].update(bits=bits))


def with_description(**values: Any) -> Forge:
    """Another description of the first weight."""
    return with_values("weights", lambda weights: next(iter(weights.values())).update(values))


def with_scale(value: float) -> Forge:
    def forge(data: bytes) -> bytes:
        header, body = split(data)
        name = next(name for name in header if name.endswith("weight_quantizer.scale"))
        start, end = header[name]["data_offsets"]
        scales = struct.pack("<f", value) * ((end - start) // 4)
        return forged(header, body[:start] + scales + body[end:])

    return forge


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


CANNOT_BE_READ, DAMAGED, OTHER, RANGE = "cannot be read", "is damaged", "does not fit the model", "scale or zero point"
DEEP = '{"a":' * 10**5 + "1" + "}" * 10**5
FORGERIES: dict[str, tuple[Forge, str]] = {
    "flipped bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), DAMAGED),
    "flipped bit in the recipe": (lambda data: data.replace(b"small", b"smalk", 1), DAMAGED),
    "cut tail": (lambda data: data[:-1], CANNOT_BE_READ),
    "empty": (lambda data: b"", CANNOT_BE_READ),
    "text": (lambda data: b"a,b\n1,2\n", CANNOT_BE_READ),
    "version": (with_text("version", "1"), "version '1', this qsam2 reads 2"),
    "newer version": (with_text("version", "3"), "version '3', this qsam2 reads 2"),
    "product of a shape": (with_tensor(shape=[2**40, 2**40]), CANNOT_BE_READ),
    "negative shape": (with_tensor(shape=[-5, -1]), CANNOT_BE_READ),
    "shape past 64 bits": (with_tensor(shape=[2**64]), CANNOT_BE_READ),
    "terabytes": (with_more(dtype="F32", shape=[2**38], data_offsets=[0, 2**40]), CANNOT_BE_READ),
    "length of the header": (lambda data: struct.pack("<Q", 2**40) + data[8:], CANNOT_BE_READ),
    "largest length": (lambda data: struct.pack("<Q", 2**64 - 1) + data[8:], CANNOT_BE_READ),
    "nothing, many times": (with_more(dtype="F32", shape=[0, 2**63]), DAMAGED),
    "odd type": (with_more(dtype="F4", shape=[0]), f"{OTHER}: more"),
    "a tensor more": (with_more(dtype="BOOL", shape=[0]), f"{OTHER}: more"),
    "bits 0": (with_bits(0), "bits=0"),
    "bits 64": (with_bits(64), "bits=64"),
    "other bits": (with_bits(8), OTHER),
    "described bits": (with_description(bits=64), OTHER),
    "described shape": (with_description(shape=[2**40, 2**40]), OTHER),
    "picture": (with_recipe(lambda values: values["model"].update(image_size=32 * 10**8)), "multiple of 32 from 64 to"),
    "size": (with_recipe(lambda values: values["model"].update(size="../nano")), "model.size='../nano'"),
    "no recipe": (with_text("recipe", "{}"), "recipe"),
    "a list": (with_text("recipe", "[]"), DAMAGED),
    "a number": (with_text("extra", "1"), DAMAGED),
    "no JSON": (with_text("weights", "{"), DAMAGED),
    "nested": (with_text("extra", DEEP), DAMAGED),
    "nested recipe": (with_text("recipe", '{"a":' * 700 + "1" + "}" * 700), "'a'"),
    "negative scale": (with_scale(-1.0), RANGE),
    "NaN": (with_scale(float("nan")), RANGE),
    "infinite": (with_scale(float("inf")), RANGE),
}


@pytest.mark.parametrize(("forge", "fact"), FORGERIES.values(), ids=FORGERIES.keys())
def test_forgeries_are_refused(forge: Forge, fact: str, packed: bytes, tmp_path: Path, message: Message) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(forge(packed))
    with pytest.raises(UserError) as error:
        load_model(path)
    assert fact in message(error)


def test_what_is_not_changed_loads(packed: bytes, tmp_path: Path) -> None:
    """The forger's tools do not themselves break a file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(forged(*split(packed)))
    assert load_model(path)[0].image_size == 64


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("how", ["pickle", "torch", "state"])
def test_a_pickle_in_disguise_is_not_run(how: str, suffix: str, tmp_path: Path, message: Message) -> None:
    path, touched = tmp_path / f"model.{suffix}", tmp_path / "touched"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap(touched)))
    elif how == "torch":
        torch.save({"model": Trap(touched)}, path)
    else:
        torch.save({"model": {"weight": torch.zeros(2), "more": Trap(touched)}}, path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert ("could run code" if suffix == "pt" else CANNOT_BE_READ) in message(error)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Trap(touched)))
    assert touched.exists()  # the trap works


def _pickle_name(path: Path, packed: bytes) -> Path:
    path.with_suffix(".pt").write_bytes(packed)
    return path.with_suffix(".pt")


def _float_with_recipe(text: str) -> Callable[[Path, bytes], Path]:
    def write(path: Path, _: bytes) -> Path:
        save_file({"a": torch.zeros(1)}, path, {"format": "qsam2-float", "recipe": text})
        return path

    return write


def _first_weight(*shape: int) -> Callable[[Path, bytes], Path]:
    def write(path: Path, _: bytes) -> Path:
        save_file({"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(shape)}, path)
        return path

    return write


FOREIGN: dict[str, tuple[Callable[[Path, bytes], Path], str]] = {
    "packed named .pt": (_pickle_name, ".safetensors"),
    **{f"float, recipe {text[:9]}": (_float_with_recipe(text), DAMAGED) for text in ("{", "[]", "1", DEEP)},
    "names of a checkpoint, a scalar": (_first_weight(), "no SAM2 checkpoint"),
    "names of a checkpoint, a vector": (_first_weight(32), "no SAM2 checkpoint"),
}


@pytest.mark.parametrize(("write", "fact"), FOREIGN.values(), ids=FOREIGN.keys())
def test_other_files_are_refused(
    write: Callable[[Path, bytes], Path], fact: str, packed: bytes, tmp_path: Path, message: Message
) -> None:
    path = write(tmp_path / "odd.safetensors", packed)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert fact in message(error) and path.name in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "a folder", "no metadata"])
def test_what_is_no_packed_file_is_refused(kind: str, tmp_path: Path, message: Message) -> None:
    path = tmp_path if kind == "a folder" else tmp_path / "model.safetensors"
    if kind == "no metadata":
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert str(path) in message(error)
