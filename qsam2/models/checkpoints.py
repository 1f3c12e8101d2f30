"""Checkpoints (Meta's `.pt` files and safetensors): find or download, read safely, check against the model, load."""

from __future__ import annotations

import hashlib
import importlib.resources
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qsam2.errors import UserError
from qsam2.models.nano.heavy import make_heavy
from qsam2.models.sam2 import EMBEDDED, SAM2, SIZES, build_sam2, model_config
from qsam2.output import listed

HIERA_WIDTH, HIERA_STAGES = 96, (2, 3, 16, 3)
"""Defaults of `sam2`'s Hiera, for sizes whose configuration omits them (base_plus)."""

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
        checkpoint: a path; "auto" for the official weights (those of nano and nano_heavy ship in the package); None for
            random weights.

    Raises:
        UserError: the checkpoint is not found, unreadable or does not fit.
    """
    model = build_sam2(size, version=version, image_size=image_size, drop_path_rate=drop_path_rate)
    if checkpoint is None:
        return model
    path = find_checkpoint(size, version) if checkpoint == "auto" else Path(checkpoint)
    load_weights(model, read_state_dict(path), source=str(path), size=size)
    if size == "nano_heavy" and checkpoint == "auto":
        make_heavy(model, read_state_dict(packaged("nano_heavy.safetensors")))
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
        return Path(hf_hub_download(repository, name))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"no checkpoint for size {size}: {name} is not in ./ or ./checkpoints/ and could not be downloaded from "
            f"{repository} ({type(error).__name__}); put it into ./checkpoints/ or give model.checkpoint=PATH"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read `{"model": state_dict}` (Meta's layout), a bare state dict, or safetensors, without running code.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give the path of a .pt or .safetensors file")
    try:
        with path.open("rb") as file:  # safetensors start with eight bytes of length, then JSON
            is_safetensors = file.read(9)[8:] == b"{"
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        elif is_safetensors:
            raise UserError(f"checkpoint {path} is a safetensors file under another name: let it end in .safetensors")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower():
            raise UserError(
                f"checkpoint {path} was not loaded: it holds more than tensors and could run code; "
                "use a file from a source that you trust, saved as a plain state dict or safetensors"
            ) from error
        raise _unreadable(path) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise _unreadable(path) from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f'checkpoint {path} holds no state dict: expected {{"model": {{name: tensor}}}} or {{name: tensor}}'
        )
    return {str(name): tensor for name, tensor in state.items()}


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
        fitting = f"; it fits model.size={guess[0]} model.version={guess[1]}" if guess else ""
        raise UserError(f"checkpoint {source} does not fit model.size={size} ({differences}){fitting}")
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"checkpoint {source} has NaN or infinite values in {listed(broken)}; it is of no use")
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def guess_size(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(size, version) of a state dict, from its trunk and heads; None if no size fits."""
    stem = state.get("image_encoder.trunk.patch_embed.proj.weight")
    if stem is None or stem.dim() != 4:
        return None
    blocks = {name.split(".")[3] for name in state if name.startswith("image_encoder.trunk.blocks.")}
    version = "2.1" if "no_obj_embed_spatial" in state else "2"
    for size in SIZES:
        trunk = model_config(size).image_encoder.trunk
        width, depth = trunk.get("embed_dim", HIERA_WIDTH), sum(trunk.get("stages", HIERA_STAGES))
        if (stem.shape[0], len(blocks)) == (width, depth):
            return size, version
    return None


def _unreadable(path: Path) -> UserError:
    size_bytes = path.stat().st_size
    return UserError(
        f"checkpoint {path} cannot be read ({size_bytes} bytes): truncated or not a checkpoint; fetch it again"
    )
