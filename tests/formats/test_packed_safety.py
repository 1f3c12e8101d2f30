"""A packed file may come from anywhere: damaged or forged, it is refused in one line; nothing in it is run."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import zlib
from collections.abc import Callable, Sequence
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

METADATA = "__metadata__"
MUTATED, FORGED = 1000, 300
GROWTH_MB = 300
"""Memory that reading all of them may take."""
ODD: tuple[Any, ...] = (
    0, -1, 1, 7, 64, 2**31, 2**62, 2**63, 2**64 - 1, 2**80, 1e308, 0.5, None, True, "", "x", "\n", [], {}, [-1, 2],
    "F32", "F16", "BF16", "F64", "U8", "I8", "I64", "U64", "BOOL", "F8_E4M3", "F4", "C64", "X9",
)  # fmt: skip


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def crc(parts: dict[str, bytes]) -> str:
    checksum = 0
    for name in sorted(parts):
        checksum = zlib.crc32(parts[name], zlib.crc32(name.encode(), checksum))
    return str(checksum)


def forged(header: Any, body: bytes) -> bytes:
    """A file with checksums that fit, as an attacker would write it."""
    if not isinstance(header, dict):
        return join(header, body)
    tensors = {name: value for name, value in header.items() if name != METADATA}
    metadata = header[METADATA] if isinstance(header.get(METADATA), dict) else {}
    texts = {key: str(metadata[key]).encode() for key in ("extra", "recipe", "weights") if key in metadata}
    contents = {}
    for name, tensor in tensors.items():
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if isinstance(offsets, list) and all(isinstance(offset, int) for offset in offsets):
            contents[name] = body[slice(*offsets[:2])]
    checksums = {"header_crc32": crc(texts), "crc32": crc(contents)}
    return join({**tensors, METADATA: {**metadata, **checksums}}, body)


def mutated(data: bytes, rng: np.random.Generator, other: bytes, kind: int) -> bytes:
    """A packed file with flipped bits, cut, lengthened, with a piece of itself or another, or with another header."""
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 500))
    if kind == 0:
        flipped, (size,) = bytearray(data), struct.unpack("<Q", data[:8])
        for limit in rng.choice([8, 8 + size, len(data)], rng.integers(1, 9)):  # in the length, the header, anywhere
            flipped[rng.integers(limit)] ^= 1 << rng.integers(8)
        return bytes(flipped)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.bytes(length) + data[at:]
    if kind == 3:
        source = [data, other][rng.integers(2)]
        start = rng.integers(len(source))
        return data[:at] + source[start : start + length] + data[at + length :]
    header, body = split(data)
    return join(changed_header(header, rng), body)


def changed_header(header: dict[str, Any], rng: np.random.Generator) -> Any:
    if rng.integers(2):
        return changed(header, rng)
    return {**header, METADATA: changed(header[METADATA], rng)}


def changed(value: Any, rng: np.random.Generator) -> Any:
    """Nested values, JSON in texts included, with one of them left out, exchanged, renamed or replaced at random."""
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(changed(json.loads(value), rng))
    kind = int(rng.integers(8))
    if not isinstance(value, dict | list) or not value or kind == 7:
        return ODD[rng.integers(len(ODD))]
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    keys = list(items)
    one, two = (keys[index] for index in rng.integers(len(keys), size=2))
    if kind == 0:
        del items[one]
    elif kind == 1:
        items[one], items[two] = items[two], items[one]
    elif kind == 2:
        items[f"{one}x"] = items.pop(one)
    else:
        items[one] = changed(items[one], rng)
    return items if isinstance(value, dict) else list(items.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, nn.Module]:
    """A packed file, another one, and the first one's model."""
    folder, models = tmp_path_factory.mktemp("packed"), []
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


def test_a_thousand_mutated_files_are_refused_or_equal(saved, tmp_path):
    data, other, model = saved
    original, path = tmp_path / "original.safetensors", tmp_path / "mutated.safetensors"
    original.write_bytes(data)
    before_mb, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0
    for seed in range(MUTATED):
        loaded = outcome(path, mutated(data, np.random.default_rng(seed), other, seed % 6))
        refused += loaded is None
        if loaded is not None:
            assert_equal(loaded, model)
            assert read_header(path) == read_header(original)
    assert refused > 0.9 * MUTATED  # the rest changed nothing that counts
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 < before_mb + GROWTH_MB


def test_forged_files_with_right_checksums_do_no_harm(saved, tmp_path):
    """A forged file that loads is a sound model, if not the same one."""
    data, x, loaded = saved[0], torch.randn(1, 3, 6, 6), 0
    for seed in range(FORGED):
        rng, (header, body) = np.random.default_rng(seed), split(data)
        if seed % 2:
            header = changed_header(header, rng)
        else:
            content = np.frombuffer(body, np.uint8).copy()
            content[rng.integers(len(body), size=3)] ^= rng.integers(1, 256, size=3, dtype=np.uint8)
            body = content.tobytes()
        model = outcome(tmp_path / "forged.safetensors", forged(header, body))
        if model is not None:
            loaded += 1
            assert isinstance(model(x), torch.Tensor)
    assert 0.1 * FORGED < loaded < 0.9 * FORGED


# What a forger would try, by the way that all models are loaded


@pytest.fixture(scope="module")
def packed(models: dict[str, Path]) -> bytes:
    """Packed file of a nano with random weights."""
    return (models["packed"] / "model.safetensors").read_bytes()


Forge = Callable[[bytes], bytes]


def with_more(dtype: str, shape: list[int], size: int = 0) -> Forge:
    """One more tensor behind all others, and checksums that fit."""

    def forge(data: bytes) -> bytes:
        header, body = split(data)
        offsets = [len(body), len(body) + size]
        return forged({**header, "more": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, body)

    return forge


def with_values(*path: str, **values: Any) -> Forge:
    """Other values in the header or in one of its JSON texts; "*" is the first key but the metadata's."""

    def update(inner: Any, keys: Sequence[str]) -> Any:
        if isinstance(inner, str):
            return json.dumps(update(json.loads(inner), keys))
        if not keys:
            return {**inner, **values}
        key = next(name for name in inner if name[0] != "_") if keys[0] == "*" else keys[0]
        return {**inner, key: update(inner[key], keys[1:])}

    def forge(data: bytes) -> bytes:
        header, body = split(data)
        return forged(update(header, path), body)

    return forge


def with_scale(value: float) -> Forge:
    def forge(data: bytes) -> bytes:
        header, body = split(data)
        name = next(name for name in header if name.endswith("weight_quantizer.scale"))
        start, end = header[name]["data_offsets"]
        return forged(header, body[:start] + struct.pack("<f", value) * ((end - start) // 4) + body[end:])

    return forge


CANNOT_BE_READ, DAMAGED, OTHER, RANGE = "cannot be read", "is damaged", "does not fit the model", "scale or zero point"
DEEP = '{"a":' * 10**5 + "1" + "}" * 10**5
WEIGHTS = (METADATA, "recipe", "quantize", "weights")
FORGERIES: dict[str, tuple[Forge, str]] = {
    "flipped bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), DAMAGED),
    "flipped bit in the recipe": (lambda data: data.replace(b"small", b"smalk", 1), DAMAGED),
    "cut tail": (lambda data: data[:-1], CANNOT_BE_READ),
    "empty": (lambda data: b"", CANNOT_BE_READ),
    "text": (lambda data: b"a,b\n1,2\n", CANNOT_BE_READ),
    "version": (with_values(METADATA, version="1"), "version '1', this qsam2 reads 2"),
    "newer version": (with_values(METADATA, version="3"), "version '3', this qsam2 reads 2"),
    "product of a shape": (with_values("*", shape=[2**40, 2**40]), CANNOT_BE_READ),
    "negative shape": (with_values("*", shape=[-5, -1]), CANNOT_BE_READ),
    "shape past 64 bits": (with_values("*", shape=[2**64]), CANNOT_BE_READ),
    "terabytes": (with_more("F32", [2**38], 2**40), CANNOT_BE_READ),
    "length of the header": (lambda data: struct.pack("<Q", 2**40) + data[8:], CANNOT_BE_READ),
    "largest length": (lambda data: struct.pack("<Q", 2**64 - 1) + data[8:], CANNOT_BE_READ),
    "nothing, many times": (with_more("F32", [0, 2**63]), DAMAGED),
    "odd type": (with_more("F4", [0]), f"{OTHER}: more"),
    "a tensor more": (with_more("BOOL", [0]), f"{OTHER}: more"),
    "bits 0": (with_values(*WEIGHTS, bits=0), "bits=0"),
    "bits 64": (with_values(*WEIGHTS, bits=64), "bits=64"),
    "other bits": (with_values(*WEIGHTS, bits=8), OTHER),
    "described bits": (with_values(METADATA, "weights", "*", bits=64), OTHER),
    "described shape": (with_values(METADATA, "weights", "*", shape=[2**40, 2**40]), OTHER),
    "picture": (with_values(METADATA, "recipe", "model", image_size=32 * 10**8), "multiple of 32 from 64 to"),
    "size": (with_values(METADATA, "recipe", "model", size="../nano"), "model.size='../nano'"),
    "no recipe": (with_values(METADATA, recipe="{}"), "recipe"),
    "a list": (with_values(METADATA, recipe="[]"), DAMAGED),
    "a number": (with_values(METADATA, extra="1"), DAMAGED),
    "no JSON": (with_values(METADATA, weights="{"), DAMAGED),
    "nested": (with_values(METADATA, extra=DEEP), DAMAGED),
    "nested recipe": (with_values(METADATA, recipe='{"a":' * 700 + "1" + "}" * 700), "'a'"),
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
    else:
        trap = Trap(touched)
        torch.save({"model": trap if how == "torch" else {"weight": torch.zeros(2), "more": trap}}, path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "could run code" in message(error)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Trap(touched)))
    assert touched.exists()  # the trap works


Write = Callable[[Path, bytes], Path]


def _tensors(tensors: dict[str, torch.Tensor], **metadata: str) -> Write:
    def write(path: Path, _: bytes) -> Path:
        save_file(tensors, path, metadata)
        return path

    return write


PATCHES = "image_encoder.trunk.patch_embed.proj.weight"
FOREIGN: dict[str, tuple[Write, str]] = {
    **{
        f"float, recipe {text[:9]}": (_tensors({"a": torch.zeros(1)}, format="qsam2-float", recipe=text), DAMAGED)
        for text in ("{", "[]", "1", DEEP)
    },
    "names of a checkpoint, a scalar": (_tensors({PATCHES: torch.zeros(())}), "no SAM2 checkpoint"),
    "names of a checkpoint, a vector": (_tensors({PATCHES: torch.zeros(32)}), "no SAM2 checkpoint"),
}


@pytest.mark.parametrize(("write", "fact"), FOREIGN.values(), ids=FOREIGN.keys())
def test_other_files_are_refused(write: Write, fact: str, packed: bytes, tmp_path: Path, message: Message) -> None:
    path = write(tmp_path / "odd.safetensors", packed)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert fact in message(error) and path.name in str(error.value)


def test_the_content_decides_not_the_suffix(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(packed)
    assert load_model(tmp_path / "model.pt")[1].quantize is not None


@pytest.mark.parametrize("kind", ["missing", "a folder", "no metadata"])
def test_what_is_no_packed_file_is_refused(kind: str, tmp_path: Path, message: Message) -> None:
    path = tmp_path if kind == "a folder" else tmp_path / "model.safetensors"
    if kind == "no metadata":
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert str(path) in message(error)
