"""The packed file: a finalized model with its weights at their bit width, restored bit for bit.

A safetensors file, described byte by byte in `docs/packed.md`. Its metadata holds `format`, `version`, `crc32` of all
tensors, `header_crc32` of what follows, and as JSON `recipe`, `extra` and `weights` (for each quantized layer its bits,
qmin, channel dimension, shape and dtype). Its tensors are
  LAYER.weight.packed      uint8: codes - qmin in row-major order, `bits` bits each, least significant bit first
  QUANTIZER.scale          float32 (channels,) or (1,); a value is scale * (code - zero_point)
  QUANTIZER.zero_point     float32, as long as the scale, or (1,) where all channels share it
and the rest of the state dict unchanged. Learned step sizes and running statistics are left out: a loaded model is for
inference, or must be calibrated anew.

Files are untrusted: reading one runs no code, allocates no more than its size, and raises a UserError if anything is
wrong. Float models are written as a plain state dict (`save_weights`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qsam2.errors import UserError
from qsam2.layers.convert import convert, quantized_weights, quantizers
from qsam2.models import SAM2
from qsam2.output import listed, write_tensors
from qsam2.quantizers import Quantizer, QuantizerState
from qsam2.recipe.quantize import ConvertedLayer, QuantizeRecipe

FORMAT, FLOAT_FORMAT = "qsam2-packed", "qsam2-float"
VERSION = 2
HEADER = ("extra", "recipe", "weights")
"""Metadata keys with JSON values."""
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError, AttributeError)
"""Errors of safetensors and PyTorch on impossible headers."""
GROUP = 8
"""Values packed together: 8 values of b bits are b bytes, which fit into an int64."""
MAX_SHOWN = 200
"""Characters of untrusted text that a message shows."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes 0..2^bits-1 (n,) of any integer type into ceil(n * bits / 8) bytes, uint8; bits from 1 to 8."""
    groups = torch.nn.functional.pad(codes.flatten().long(), (0, -codes.numel() % GROUP)).view(-1, GROUP)
    words = (groups << bits * torch.arange(GROUP, device=codes.device)).sum(dim=1, keepdim=True)
    stream = (words >> 8 * torch.arange(bits, device=codes.device)) & 255
    return stream.to(torch.uint8).flatten()[: packed_size(codes.numel(), bits)]


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` codes, int64 (count,)."""
    padded = torch.nn.functional.pad(stream.long(), (0, -stream.numel() % bits)).view(-1, bits)
    words = (padded << 8 * torch.arange(bits, device=stream.device)).sum(dim=1, keepdim=True)
    codes = (words >> bits * torch.arange(GROUP, device=stream.device)) & (2**bits - 1)
    return codes.flatten()[:count]


def packed_size(count: int, bits: int) -> int:
    """Size of `count` packed values in bytes."""
    return (count * bits + 7) // 8


def model_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors in float32, in bfloat16, and packed (without header).

    For a float model `packed` is the size of its tensors in their own dtypes.
    """
    floats = _float_tensors(model).values()
    values = sum(tensor.numel() for tensor in floats)
    packed = sum(tensor.nbytes for tensor in (*floats, *_grids(model).values()))
    for _, layer, quantizer in quantized_weights(model):
        values += layer.weight.numel()
        packed += packed_size(layer.weight.numel(), quantizer.bits)
    return {"float32": 4 * values, "bfloat16": 2 * values, "packed": packed}


@torch.no_grad()
def save_packed(
    path: str | Path, model: nn.Module, recipe: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a finalized model, whole or not at all.

    Args:
        recipe, extra: plain values; `recipe["quantize"]` is the section that converted the model.

    Raises:
        RuntimeError: the model is not finalized.
        UserError: the file cannot be written.
    """
    for name, quantizer in quantizers(model):
        if quantizer.state is not QuantizerState.FROZEN:
            raise RuntimeError(f"{name} is {quantizer.state.name}: finalize the model before it is packed")
    tensors = {**_grids(model), **_float_tensors(model)}
    for name, layer, quantizer in quantized_weights(model):
        codes = quantizer.to_int(layer.weight)
        if not torch.equal(quantizer.dequantize(codes, layer.weight.dtype), layer.weight):
            raise RuntimeError(f"{name}.weight is not its own integers: finalize the model before it is packed")
        tensors[f"{name}.weight.packed"] = pack_bits(codes - quantizer.qmin, quantizer.bits)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "extra": json.dumps(extra or {}),
        "recipe": json.dumps(recipe),
        "weights": json.dumps(_descriptions(model)),
    }
    checksums = {"crc32": _checksum(tensors), "header_crc32": _checksum(header)}
    write_tensors(Path(path), tensors, {"format": FORMAT, "version": str(VERSION), **checksums, **header})


def save_weights(path: Path, model: SAM2, recipe: dict[str, Any]) -> None:
    """Write a float model's state dict; `qsam2.loading.load_model` and `model.checkpoint=PATH` read it.

    Raises UserError if the file could not be written; no part of it is left.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(path, state, {"format": FLOAT_FORMAT, "recipe": json.dumps(recipe)})


def read_header(path: str | Path) -> dict[str, dict[str, Any]]:
    """Header of a packed file as plain values, by the keys of `HEADER`; its tensors are not read.

    Raises:
        UserError: the file does not exist, is no packed model, is damaged, or has another version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"packed model {path} does not exist; give the file that a run or `qsam2 export` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:MAX_SHOWN]
        raise UserError(
            f"{path} cannot be read as a packed model ({reason}): truncated or another kind of file"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no packed model of qsam2: give the file that a run or `qsam2 export` wrote")
    if (version := metadata.get("version")) != str(VERSION):
        raise UserError(
            f"packed model {path} has format version {str(version)[:MAX_SHOWN]!r}, this qsam2 reads {VERSION}: "
            "update qsam2, or export the model again"
        )
    texts = {key: metadata[key] for key in HEADER if key in metadata}
    if metadata.get("header_crc32") != _checksum(texts):
        raise _damaged(path)
    try:
        values = {key: json.loads(texts[key]) for key in HEADER}
    except (KeyError, ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not all(isinstance(value, dict) for value in values.values()):
        raise _damaged(path)
    return values


@torch.no_grad()
def load_packed(path: str | Path, model: nn.Module) -> list[ConvertedLayer]:
    """Convert a float model in place by the file's recipe and load its tensors; returns the conversion table.

    The model then equals the finalized one bit for bit.

    Raises:
        UserError: as `read_header`, or the file does not fit the model.
        ValueError: the model is converted already.
    """
    path = Path(path)
    header, tensors = read_header(path), _tensors(path)
    try:
        rows = convert(model, QuantizeRecipe.model_validate(header["recipe"].get("quantize")))
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"packed model {path} was made by a recipe that this version refuses: {problem}") from error
    if header["weights"] != _descriptions(model):
        raise UserError(f"packed model {path} does not fit the model: other layers, shapes or bits; check model.size")
    floats = _float_tensors(model)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in {**floats, **_grids(model)}.items()}
    for name, layer, quantizer in quantized_weights(model):
        size = packed_size(layer.weight.numel(), quantizer.bits)
        expected[f"{name}.weight.packed"] = torch.Size([size]), torch.uint8
    stored = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if differing := sorted({name for name, _ in expected.items() ^ stored.items()}):
        raise UserError(
            f"packed model {path} does not fit the model: {listed(differing)} missing or of another shape or dtype"
        )
    if broken := [name for name in floats if not bool(tensors[name].isfinite().all())]:
        raise UserError(f"packed model {path} has NaN or infinite values in {broken[0]}; it is of no use")

    for name, quantizer in quantizers(model):
        scale, zero_point = tensors[f"{name}.scale"], tensors[f"{name}.zero_point"]
        if not _is_grid(quantizer, scale, zero_point):
            raise UserError(f"packed model {path} is damaged: {name} has a scale or zero point that none can have")
        state = {
            "frozen_scale": scale,
            "frozen_zero_point": zero_point.expand_as(scale),
            "is_calibrated": torch.tensor(1),
            "state_code": torch.tensor(QuantizerState.FROZEN.value),
            "is_mid_rise": torch.tensor(_lie_between_codes(zero_point)),  # used only if calibration chooses the grid
        }
        quantizer.load_state_dict(state, strict=False)
    for name, layer, quantizer in quantized_weights(model):
        weight = layer.weight
        codes = unpack_bits(tensors[f"{name}.weight.packed"], quantizer.bits, weight.numel()) + quantizer.qmin
        weight.copy_(quantizer.dequantize(codes.view(weight.shape).to(weight.device), weight.dtype))
    model.load_state_dict({name: tensors[name] for name in floats}, strict=False)
    return rows


def differing(model: nn.Module, other: nn.Module) -> list[str]:
    """Names of what a file holds, weights, grids and all in float, that is not the same in two models."""

    def contents(model: nn.Module) -> dict[str, Tensor]:
        weights = {f"{name}.weight": layer.weight for name, layer, _ in quantized_weights(model)}
        return {**_float_tensors(model), **_grids(model), **weights}

    ours, theirs = contents(model), contents(other)
    same = {name for name in ours.keys() & theirs.keys() if torch.equal(ours[name], theirs[name].to(ours[name]))}
    return sorted((ours.keys() | theirs.keys()) - same)


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without quantized weights and quantizers."""
    left_out = [f"{name}." for name, _ in quantizers(model)]
    left_out += [f"{name}.weight" for name, _, _ in quantized_weights(model)]
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(left_out))}


def _grids(model: nn.Module) -> dict[str, Tensor]:
    """Scales and zero points of all quantizers; a symmetric grid has one zero point in all."""
    tensors = {}
    for name, quantizer in quantizers(model):
        tensors[f"{name}.scale"] = quantizer.scale
        tensors[f"{name}.zero_point"] = quantizer.zero_point[: 1 if quantizer.grid.symmetric else None]
    return tensors


def _is_grid(quantizer: Quantizer, scale: Tensor, zero_point: Tensor) -> bool:
    grid = quantizer.grid
    if grid.symmetric:
        fits = zero_point == grid.zero_point(scale, scale)[:1]
    else:
        half = 0.5 if quantizer.spec.grid == "least_error" and _lie_between_codes(zero_point) else 0.0
        whole = (zero_point - half).round() + half
        fits = (zero_point == whole) & (zero_point >= grid.qmin) & (zero_point <= grid.qmax)
    return bool((scale.isfinite() & (scale > 0)).all() and fits.all())


def _lie_between_codes(zero_points: Tensor) -> bool:
    """True if all zero points lie half-way between two codes (mid-rise grid)."""
    return bool((zero_points - zero_points.floor() == 0.5).all())


def _descriptions(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "bits": quantizer.bits,
            "qmin": quantizer.qmin,
            "channel_dim": layer.channel_dim,
            "shape": list(layer.weight.shape),
            "dtype": str(layer.weight.dtype).removeprefix("torch."),
        }
        for name, layer, quantizer in quantized_weights(model)
    }


def _checksum(parts: Mapping[str, str | Tensor]) -> str:
    """CRC-32 over all names and contents, sorted by name, as a decimal number."""
    checksum = 0
    for name, part in sorted(parts.items()):
        content = part.encode() if isinstance(part, str) else part.reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return str(checksum)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            checksum = file.metadata().get("crc32")
        actual = _checksum(tensors)
    except UNREADABLE as error:
        raise _damaged(path) from error
    if checksum != actual:
        raise _damaged(path)
    return tensors


def _damaged(path: Path) -> UserError:
    return UserError(f"packed model {path} is damaged (its checksum or header is wrong): copy or export it again")
