"""The library's commands as functions: `qsam2.quantize`, `qsam2.evaluate`, `qsam2.export`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsam2 import pipeline
from qsam2.data.sources import open_videos, source_of
from qsam2.data.unlabelled import is_unlabelled
from qsam2.errors import UserError
from qsam2.evaluation import scoring
from qsam2.formats.packed import read_header
from qsam2.loading import load_model
from qsam2.output import quiet_libraries, read_json, write_whole
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.load import SIZES, merge, read_recipe
from qsam2.recipe.quantize import parse_bits
from qsam2.recipe.source import parts_of

log = logging.getLogger("qsam2")

FORMATS = ("onnx", "packed")
PTQ: Mapping[str, Any] = {
    "data": {"max_stride": 2, "max_objects": 2},
    "evaluate": {"videos": 20, "frames": 32},
    "log": {"wandb": "off"},
}
"""Values that `quantize` sets if no recipe is named, beside bits, data and the amount of calibration."""
FEW_BITS = 3
"""Weights of up to so many bits are rounded by GPTQ: nano at W2A8 scores J&F 68 with it and 12 without."""
STILLS, CLIPS, CLIP_FRAMES = 32, 8, 6
"""Calibration of `quantize`; less if the data holds less."""


@dataclass(frozen=True)
class Quantized:
    """A finished run of `quantize`: its folder, the recipe it carried out, and what `metrics.json` holds."""

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]

    @property
    def file(self) -> Path:
        """The packed model."""
        return self.folder / "model.safetensors"


@torch.inference_mode(False)  # as `load`
def quantize(
    checkpoint: str | Path,
    recipe: str | Path | None = None,
    data: str | Path | None = None,
    *,
    bits: int | str | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Quantized:
    """Quantize a float model, as `qsam2 quantize`: calibration alone, or what a recipe says.

    Args:
        checkpoint: a float MODEL: a file (`.pt`, `.safetensors`; its size is found by its shapes) or a size.
        recipe: a recipe file, or the name of a shipped one; None: ranges of least error at `bits`, no training.
        data: a source (`KIND:ROOT:SPLIT`), or a folder or file of pictures, videos or DAVIS; None: the recipe's, or
            generated videos. Pictures and videos need no masks, see `qsam2.data.unlabelled`.
        bits: of weights and activations: 8, "w4a8", or "w4" for weights alone; from 2 to 8. None: the recipe's, or 8.
        out: run folder; None: runs/NAME.
        overrides: `key=value` on top.

    Raises:
        UserError: the checkpoint, the recipe or the data cannot be used.

    Example:
        >>> smaller = ["model.image_size=128"]  # than nano's own 320 pixels: faster
        >>> result = qsam2.quantize("nano", data="pictures", bits="w8a8", out="runs/w8a8", overrides=smaller)
        >>> result.metrics["quantized"]["fidelity"] <= 100
        True
        >>> model = qsam2.load(result.folder)
    """
    quiet_libraries()
    _, own = load_model(checkpoint)
    if own.quantize is not None:
        raise UserError(f"{checkpoint} is quantized already: give the float model it was made from")
    sources = _sources(source_of(data)) if data is not None else {}
    if recipe is None:
        values = _calibration_alone(own.model.size, 8 if bits is None else bits, sources)
    else:
        values = merge({"log": PTQ["log"]}, read_recipe(recipe, [f"model.size={own.model.size}", *overrides]))
        if bits is not None:
            pairs = zip(("weights", "activations"), parse_bits(bits), strict=True)
            changed = {part: {"bits": number} if number else None for part, number in pairs}
            values = merge(values, {"quantize": changed})
    values = merge(values, {"model": own.model.model_dump(mode="json"), "data": sources})
    if out is not None:
        values["output"] = str(out)
    plan = build_recipe(values, overrides)
    if plan.quantize is None:
        raise UserError("quantize=null quantizes nothing: give a recipe with quantize, or --bits")
    return Quantized(plan.run_folder, plan, pipeline.carry_out(plan))


def _calibration_alone(size: str, bits: int | str, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the recipe that `quantize` carries out if none is named."""
    weights, activations = parse_bits(bits)
    methods = {
        part: {"method": "minmax", "bits": number, "range": "mse"} if number else None
        for part, number in (("weights", weights), ("activations", activations))
    }
    amount: dict[str, Any] = {"stills": STILLS, "clips": CLIPS, "num_frames": CLIP_FRAMES}
    if sources:
        frames = [len(video) for video in open_videos(sources["train"][0], split="train")]
        clips = sum(max(length - CLIP_FRAMES + 1, 1) for length in frames)
        amount |= {"stills": min(STILLS, sum(frames)), "clips": min(CLIPS, clips)}
    if weights <= FEW_BITS and amount["clips"] > 1:  # it is fitted on one half of the clips and chosen on the other
        amount["rounding"] = "gptq"
    name = f"{size}-w{weights}" + (f"a{activations}" if activations else "")
    return {**PTQ, "name": name, "quantize": methods, "calibrate": amount}


def _sources(spec: str) -> dict[str, Any]:
    """`data.train` and `data.val` of a source; without masks and split, every fifth picture or piece is held out."""
    if parts_of(spec)[2]:
        return {"train": [spec], "val": spec}
    if is_unlabelled(spec):
        return {"train": [f"{spec}:train"], "val": f"{spec}:val"}
    return {"train": [spec]}


@torch.inference_mode(False)  # as `load`
def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    protocol: str | None = None,
    frames: int | None = None,
    videos: int | None = None,
    fast: bool = False,
    save_masks: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The score block of a MODEL, as `qsam2 evaluate`: J&F on videos, point and box mIoU on stills, in percent.

    Args:
        model: run folder, file or size.
        data: a source (`KIND:ROOT:SPLIT`), or a folder or file of pictures, videos or DAVIS; all of it is scored. None:
            as the model's recipe says.
        reference: the float MODEL to compare with: adds fidelity. Data without masks needs it.
        protocol: davis or sav; None: the recipe's.
        frames, videos: score the first so many only.
        fast: score the model as `qsam2.load(model, fast=True)` gives it.
        save_masks: new folder for the tracked masks, in the layout that the benchmark servers of the protocol take.
        overrides: `key=value` on top of the model's own recipe.

    Raises:
        UserError: the model or the data cannot be used.

    Example:
        >>> scores = qsam2.evaluate("nano", "moving_objects:1:val", frames=4)
        >>> 0 <= scores["J&F"] <= 100
        True
    """
    quiet_libraries()
    values = {"data.val": None, "evaluate.protocol": protocol, "evaluate.frames": frames, "evaluate.videos": videos}
    whole: list[str] = []
    if data is not None:
        spec = source_of(data)
        _, root, split = parts_of(spec)
        values["data.val"] = f"{spec}:all" if is_unlabelled(spec) and root and not split else spec
        whole = ["evaluate.frames=null", "evaluate.videos=null"]  # a run's own limits are for its own data
    flags = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]  # as text: "a #1"
    return scoring.evaluate_model(
        str(model),
        [*whole, *overrides, *flags],
        reference=None if reference is None else str(reference),
        fast=fast,
        save_masks=None if save_masks is None else Path(save_masks),
    )


@torch.inference_mode(False)  # as `load`
def export(model: str | Path, format: str, out: str | Path, *, overrides: Sequence[str] = ()) -> dict[Path, int]:
    """Write a MODEL for other runtimes, as `qsam2 export`: {file: bytes}.

    Args:
        model: run folder, file or size.
        format: "onnx" (five graphs and model.json) or "packed" (a copy of a quantized model's file, with its card).
        out: folder of the files, made if missing.
        overrides: `key=value` on top of the model's own recipe; onnx only.

    Raises:
        UserError: the model cannot be used, packages are missing, or the folder cannot be written.

    Example:
        >>> files = qsam2.export("runs/w8a8", "packed", "exported/w8a8")
        >>> sorted(file.name for file in files)
        ['card.json', 'card.md', 'model.safetensors']
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown: give {' or '.join(FORMATS)}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    write = _export_onnx if format == "onnx" else _export_packed
    return {out / name: size for name, size in write(model, out, overrides).items()}


def _export_onnx(model: str | Path, out: Path, overrides: Sequence[str]) -> dict[str, int]:
    from qsam2.formats.onnx.write import export_onnx, require_packages  # the extra `onnx` may be missing

    require_packages()  # before the model is loaded
    network, recipe = load_model(model, overrides)
    if recipe.memory.reads_anew:
        log.warning("the graphs read all of the memory, as sam2 does: memory.* of the recipe is not exported")
    return export_onnx(network, recipe.model_dump(mode="json"), out, card=read_json(Path(model) / "card.json"))


def _export_packed(model: str | Path, out: Path, overrides: Sequence[str]) -> dict[str, int]:
    if overrides:
        raise UserError(f"{overrides[0]!r} changes nothing in a packed file, which is copied: leave it out")
    source = Path(model)
    if str(model) in SIZES:
        raise UserError(f"{model} is a float model, the packed format is for quantized ones: see qsam2 quantize")
    folder = source if source.is_dir() else source.parent
    file = source / "model.safetensors" if source.is_dir() else source
    if file.is_file():
        read_header(file)
    load_model(model)  # a damaged file is not copied
    cards = [folder / name for name in ("card.md", "card.json") if (folder / name).is_file()]
    for path in (file, *cards):
        write_whole(out / path.name, partial(shutil.copyfile, path))
    return {path.name: path.stat().st_size for path in (file, *cards)}
