"""Checkpoints (Meta's `.pt` files and safetensors): find or download, read safely, check against the model, load."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor

from qsam2.errors import UserError, shown
from qsam2.models.nano.heavy import make_heavy
from qsam2.models.nano.tails import make_tails
from qsam2.models.sam2 import EMBEDDED, SAM2, SIZES, build_sam2, model_config
from qsam2.output import listed

HIERA_WIDTH, HIERA_STAGES = 96, (2, 3, 16, 3)
"""Defaults of `sam2`'s Hiera, for sizes whose configuration omits them (base_plus)."""

ANCHOR = "image_encoder.trunk.patch_embed.proj.weight"
"""A name that all SAM 2 models have once."""
PICKLE = b"\x80"
"""First byte of Python's pickles."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

SHA256 = {
    "nano.safetensors": "a72cba8ef0dda6da1ea99f3501a52aeba636c599c37588e1df9d8f8c7369243e",
    "nano_heavy.safetensors": "ed10bace8f789449653fed5eef8055a86421d5d53299f8a35c4f6d72b11c0be4",
}
"""Hashes of the weight files in the package."""


def load_sam2(
    size: str = "nano",
    *,
    version: str = "2.1",
    checkpoint: str | Path | None = "auto",
    image_size: int | None = None,
    drop_path_rate: float = 0.0,
) -> SAM2:
    """SAM 2 with trained weights, in float32 and eval mode.

    Args:
        checkpoint: a path; "auto" for the official weights (those of the nano sizes ship in the package); None for
            random weights.

    Raises:
        UserError: the checkpoint is not found, unreadable or does not fit.
    """
    state, source = {}, ""
    if checkpoint is not None:  # read first: a file too small for the size is refused before memory is spent
        model_config(size, version=version, image_size=image_size)
        path = find_weights(size, version, checkpoint)
        source = str(path)
        try:
            state = read_state_dict(path)
        except UserError as error:
            if checkpoint != "auto" or size in EMBEDDED:
                raise
            raise UserError(f"{error}; model.checkpoint=auto found it: remove it, or give another path") from error
        check_amount(sum(map(stored_values, state.values())), size, f"checkpoint {source}", guess_size(state))
    model = build_sam2(size, version=version, image_size=image_size, drop_path_rate=drop_path_rate)
    if checkpoint is None:
        return model
    load_weights(model, state, source=source, size=size)
    if size == "nano_heavy" and checkpoint == "auto":
        make_heavy(model, read_state_dict(packaged("nano_heavy.safetensors")))
    if size == "nano_tails" and checkpoint == "auto":
        make_tails(model)
    return model


def packaged(name: str) -> Path:
    """Path of a weight file in the package, after checking its hash.

    Raises:
        UserError: the file is missing, damaged or of another version.
    """
    path = Path(str(importlib.resources.files("qsam2.models.nano") / name))
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        raise UserError(f"{path} is missing, damaged or of another version (SHA-256): install qsam2 anew")
    return path


def find_weights(size: str, version: str, checkpoint: str | Path) -> Path:
    """Path of the weights that `checkpoint` says, see `load_sam2`, without reading them.

    Raises:
        UserError: there is no such file.
    """
    path = find_checkpoint(size, version) if checkpoint == "auto" else Path(os.path.expanduser(checkpoint))
    if not os.path.isfile(path):  # False, too, of what no path can be
        raise UserError(f"checkpoint {path} does not exist; give the path of a .pt or .safetensors file")
    return path


def find_checkpoint(size: str, version: str = "2.1") -> Path:
    """Path of the size's official checkpoint: in ./, in ./checkpoints/, in Hugging Face's cache, or downloaded.

    Raises:
        UserError: the file is in none of these places and cannot be downloaded.
    """
    if size in EMBEDDED:
        return packaged("nano.safetensors")
    repository, name = f"facebook/sam{version}-hiera-{size.replace('_', '-')}", f"sam{version}_hiera_{size}.pt"
    for folder in (Path("."), Path("checkpoints")):
        if (folder / name).is_file():
            return folder / name
    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(repository, name))  # fails at once where the download would try for a minute
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the HTTP library's, which differ between versions of the hub's client
        raise UserError(
            f"no checkpoint for size {size}: {name} is not in ./ or ./checkpoints/ and could not be downloaded from "
            f"{repository} ({type(error).__name__}); put it into ./checkpoints/ or give model.checkpoint=PATH"
        ) from error


def is_safetensors(path: Path) -> bool:
    """True if a file begins as safetensors do, whatever its name: eight bytes of length, then JSON."""
    try:
        return _start(path)[8:9] == b"{"
    except OSError:
        return False


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(200)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from PyTorch's or safetensors files, without running code, under Meta's names.

    It may lie in a mapping beside other things (`{"model": ...}`), and its names may have prefixes, as `module.` of
    DDP and `_orig_mod.` of `torch.compile`.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, a pickle that would run code, far larger than it
            looks, or holds several models.
    """
    path = Path(path)
    if not os.path.isfile(path):  # False, too, of what no path can be
        raise UserError(f"checkpoint {path} does not exist; give the path of a .pt or .safetensors file")
    try:
        _check_kind(path)
        with warnings.catch_warnings(action="ignore"):  # of dtypes and layouts that are refused below
            if is_safetensors(path):
                content: Any = load_file(path)
            else:
                with path.open("rb") as file:  # of a path, PyTorch would decide by its suffix
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (Exception, MemoryError) as error:  # a damaged pickle raises anything
        what, refused = "", re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", str(error))
        if refused:
            what = f"beside tensors it holds {refused[1]}, which could run code"
        elif "Unsupported operand" in str(error) and _start(path)[:1] == PICKLE:
            what = "it is damaged, or a pickle that PyTorch did not write, which could run code"
        if what:
            raise UserError(
                f"checkpoint {path} was not loaded: {what}; use a file from a source that you trust, saved as a plain "
                "state dict or safetensors"
            ) from error
        raise UserError(
            f"checkpoint {path} cannot be read ({path.stat().st_size} bytes): truncated or not a checkpoint; fetch it "
            "again"
        ) from error
    return _with_own_names(_state_dict_in(content, path), path)


def _check_kind(path: Path) -> None:
    """Raise UserError if a file is of another kind, or a zip file that would unpack to far more than its size."""
    start = _start(path).lstrip()
    size_bytes = path.stat().st_size
    what = ""
    if not size_bytes:
        what = "cannot be read (0 bytes): it is empty, as a download that failed leaves it"
    elif start.startswith(b"version https://git-lfs"):
        what = "is the pointer that Git LFS leaves in place of a file: run git lfs pull"
    elif start[:1] == b"<":
        what = "is a web page, not a checkpoint: download the file itself"
    if what:
        raise UserError(f"checkpoint {path} {what}; fetch it again")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 4 * size_bytes + 2**20:
            raise UserError(
                f"checkpoint {path} of {size_bytes} bytes would unpack to {unpacked}: PyTorch does not compress its "
                "files; save it anew with torch.save"
            )


def _state_dict_in(content: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping that holds the tensors: what the file holds, or a value of it."""
    if isinstance(content, Mapping):
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping) and _tensors_of(value)}
        if _tensors_of(content) and not any(ANCHOR in str(key) for value in inner.values() for key in value):
            return _tensors_of(content)
        for key in ("model", "state_dict"):
            if key in inner:
                return _tensors_of(inner[key])
        if len(inner) == 1:
            return _tensors_of(*inner.values())
        if inner:
            names = ", ".join(shown(str(key)) for key in inner)
            raise UserError(f"checkpoint {path} holds several state dicts ({names}): save one of them alone")
    raise UserError(
        f'checkpoint {path} holds no state dict: expected {{"model": {{name: tensor}}}} or {{name: tensor}}'
    )


def _tensors_of(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor) and not value.is_nested}


def _with_own_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict without the prefix that all of a model's names have; of other models it is returned as it is."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    prefixes = [name.removesuffix(ANCHOR) for name in state if name.endswith(ANCHOR)]
    if len(prefixes) > 1:
        raise UserError(
            f"checkpoint {path} holds several models ({', '.join(map(shown, prefixes))}): save one of them alone"
        )
    prefix = prefixes[0] if prefixes and all(name.startswith(prefixes[0]) for name in state) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def stored_values(tensor: Tensor) -> int:
    """Values that a tensor has memory for: less than its shape says if it was expanded."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return tensor.numel()
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1))


def check_amount(values: int, size: str, what: str, fitting: tuple[str, str] | None = None) -> None:
    """Raise UserError if a file holds far too few values for a size, before its model is built."""
    if values < SIZES[size].parameters // 2:
        hint = f"; it fits model.size={fitting[0]} model.version={fitting[1]}" if fitting and fitting[0] != size else ""
        raise UserError(
            f"{what} does not fit model.size={size}: it holds {values:,} values, the size has about "
            f"{SIZES[size].parameters:,}{hint}"
        )


def load_weights(model: SAM2, state: Mapping[str, Tensor], *, source: str, size: str) -> None:
    """Load strictly: every key of the model, no other, all shapes equal. Half-precision weights become float32.

    Raises:
        UserError: keys or shapes differ (the message names the first ones and the size that fits), or a tensor has NaN
            or infinite values.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        problems = [("missing", missing), ("unexpected", unexpected), ("other shape", shapes)]
        differences = "; ".join(f"{what}: {listed(names)}" for what, names in problems if names)
        guess = guess_size(state)
        fits = guess is not None and guess != (size, _version(own))
        fitting = f"; it fits model.size={guess[0]} model.version={guess[1]}" if guess and fits else ""
        raise UserError(f"checkpoint {source} does not fit model.size={size} ({differences}){fitting}")
    if kinds := [f"{name} ({kind})" for name, tensor in state.items() if (kind := _strange_kind(tensor))]:
        raise UserError(
            f"checkpoint {source} holds {listed(kinds)}: give dense tensors on the CPU in float32, float16, bfloat16 "
            "or float64"
        )
    converted = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    broken = [name for name, tensor in converted.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"checkpoint {source} has NaN or infinite values in {listed(broken)}; it is of no use")
    model.load_state_dict(converted)


def _strange_kind(tensor: Tensor) -> str:
    """Device, layout or dtype that keeps a tensor from being weights; empty if none does."""
    if tensor.device.type != "cpu":
        return f"on {tensor.device.type}, without values"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "" if tensor.dtype in FLOATS else str(tensor.dtype).removeprefix("torch.")


def guess_size(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(size, version) of a state dict, from its trunk and heads; None if no size fits."""
    stem = state.get(ANCHOR)
    if stem is None or stem.dim() != 4:
        return None
    blocks = {name.split(".")[3] for name in state if name.startswith("image_encoder.trunk.blocks.")}
    version = _version(state)
    for size in SIZES:
        trunk = model_config(size).image_encoder.trunk
        width, depth = trunk.get("embed_dim", HIERA_WIDTH), sum(trunk.get("stages", HIERA_STAGES))
        if (stem.shape[0], len(blocks)) == (width, depth):
            return size, version
    return None


def _version(state: Mapping[str, Tensor]) -> str:
    return "2.1" if "no_obj_embed_spatial" in state else "2"
