"""`MODEL`: a run folder, a model file, a checkpoint or a size, loaded as a model or behind `sam2`'s predictors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsam2.data.transforms import FrameSequence
from qsam2.data.video_file import open_video
from qsam2.errors import UserError, shown
from qsam2.fast.model import FAST_MEMORY, make_fast
from qsam2.formats import packed
from qsam2.layers.audit import AuditError, audit
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2, SIZES, load_sam2
from qsam2.models.checkpoints import ANCHOR, check_amount, guess_size, is_safetensors, read_state_dict
from qsam2.models.nano.scratch import initialise
from qsam2.output import listed
from qsam2.recipe import Recipe, build_recipe, load_recipe
from qsam2.recipe.load import merge
from qsam2.recipe.portable import without_places

SAME = 1e-3
"""Error of image features, as a share of their energy, up to which two models are the same: a flipped code or two."""

if TYPE_CHECKING:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from qsam2.run import Run


@torch.inference_mode(False)  # weights made under a caller's inference mode could be neither trained nor cached
def load_model(target: str | Path, overrides: Sequence[str] = ()) -> tuple[SAM2, Recipe]:
    """A model ready for inference, in eval mode, and its recipe changed by `key=value` overrides.

    `target` is a run folder (its `model.safetensors`), such a file, a checkpoint (`.pt`, `.safetensors`), or a size.

    Raises:
        UserError: there is no such model, it cannot be read, or an override is wrong.
    """
    path, places = Path(target), {}
    if path.suffix == ".onnx" or (os.path.isdir(path) and any(path.glob("*.onnx"))):
        raise UserError(
            f"{target} is an export for ONNX Runtime, which is not loaded as a MODEL: give the run or file that it was "
            "made from, or track with qsam2.formats.onnx.runtime, see docs/onnx.md"
        )
    if os.path.isdir(path):
        places = _places_of(path)
        path = path / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{target} holds no model.safetensors: the run is not finished; run its recipe again")
    if not os.path.isfile(path):  # False, too, of what no path can be
        if str(target) in SIZES:
            return _load_float({"model": {"size": str(target)}}, overrides)
        raise UserError(f"{target} is no run folder, no model file and no size ({', '.join(SIZES)})")
    metadata = _metadata(path)
    if metadata.get("format") == packed.FORMAT:
        return _load_packed(path, places, overrides)
    values = merge(_float_recipe(path, metadata), places)
    if not values:
        state = read_state_dict(path)
        guess = guess_size(state)
        if guess is None:
            what = "its shapes are of no size of SAM 2 or 2.1"
            if ANCHOR not in state:
                what = f"it lacks {ANCHOR}, as Meta names it, and holds {listed([shown(name) for name in state])}"
            raise UserError(f"{path} is no SAM2 checkpoint that qsam2 knows: {what}")
        del state
        values = {"model": {"size": guess[0], "version": guess[1]}}
    return _load_float(merge(values, {"model": {"checkpoint": str(path)}}), overrides)


def _load_float(values: dict[str, Any], overrides: Sequence[str]) -> tuple[SAM2, Recipe]:
    recipe = build_recipe(values, overrides)
    if recipe.quantize is not None:
        raise UserError("quantize=... does nothing here: this model is float; run a recipe to quantize it")
    return load_sam2(**recipe.model.model_dump()), recipe


def _places_of(folder: Path) -> dict[str, Any]:
    """Data and checkpoint of a run folder's recipe, for a run of this machine; nowhere to write is taken from it."""
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except UserError:  # none, or of another version: the model's own recipe says all but these places
        return {}
    return recipe.model_dump(mode="json", include={"data": True, "model": {"checkpoint"}, "evaluate": {"stills"}})


def _load_packed(path: Path, places: dict[str, Any], overrides: Sequence[str]) -> tuple[SAM2, Recipe]:
    values = merge(without_places(packed.read_header(path)["recipe"]), places)
    recipe, own = build_recipe(values, overrides), build_recipe(values)
    if fixed := [key for key in ("model", "quantize") if getattr(recipe, key) != getattr(own, key)]:
        raise UserError(f"{path} is a quantized model: {', '.join(fixed)} cannot be changed by an override")
    most = path.stat().st_size * 8 // 2  # at two bits each
    check_amount(most, recipe.model.size, f"packed model {path}")
    model = load_sam2(**{**recipe.model.model_dump(), "checkpoint": None})
    rows = packed.load_packed(path, model)
    try:
        audit(model, rows, recipe.quantize)
    except AuditError as error:  # a fault of the program in a model that it made itself, but this one is from a file
        first = str(error).splitlines()[1].strip()
        raise UserError(f"packed model {path} is damaged ({first}): copy or export it again") from error
    return model.eval(), recipe


@torch.no_grad()
def verify_export(run: Run) -> None:
    """Stage: load the run's file back. It has to be the model, in all that it holds and in what it computes.

    Raises:
        RuntimeError: it is not, which is a fault of the program; the file is removed and the run not finished.
    """
    if run.silent:
        return
    file, model = run.folder.model, run.model.to(run.device).eval()
    try:
        loaded = load_model(file)[0].to(run.device)
    except UserError as error:
        problem = f"cannot be loaded: {error}"
    else:
        different = packed.differing(model, loaded)
        image = torch.ones(1, 3, model.image_size, model.image_size, device=run.device)
        ours, theirs = (each.forward_image(image)["backbone_fpn"] for each in (model, loaded))
        if not different and any(_error(*pair) > SAME for pair in zip(ours, theirs, strict=True)):
            different = ["its image features"]
        problem = f"differs from the model in {listed(different)}" if different else ""
    if problem:
        file.unlink()
        raise RuntimeError(f"the file that this run wrote is removed: it {problem}")


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Energy of a difference over that of the first, so that kernels which round otherwise are no difference."""
    return float((ours - theirs).double().square().sum() / ours.double().square().sum().clamp(min=1e-30))


def _float_recipe(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The recipe that `save_weights` noted, empty where another program wrote the file."""
    if metadata.get("format") != packed.FLOAT_FORMAT:
        return {}
    with contextlib.suppress(KeyError, ValueError, RecursionError):
        if isinstance(values := json.loads(metadata["recipe"]), dict):
            return without_places(values)
    raise UserError(f"{path} is damaged: its header holds no recipe; copy or export it again")


def _metadata(path: Path) -> dict[str, str]:
    if not is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: truncated or another kind of file; copy or export it again") from error


@torch.inference_mode(False)
def load(
    model: str | Path, overrides: Sequence[str] = (), *, device: str | torch.device = "cpu", fast: bool = False
) -> SAM2:
    """A model in eval mode, its memory as its recipe says.

    Args:
        model: a run folder, a file (packed, float or a checkpoint) or a size, as on the command line.
        overrides: `key=value` on top of the model's own recipe.
        fast: made for speed, see `make_fast`; keys and values of remembered frames are kept (`memory.cache=true`).

    Raises:
        UserError: there is no such model, it cannot be read, an override is wrong, or the device is not there.

    Example:
        >>> model = qsam2.load("nano")
        >>> model.image_size
        320
    """
    device = _checked_device(device)
    loaded, recipe = load_model(model, [*FAST_MEMORY, *overrides] if fast else overrides)
    loaded = loaded.to(device)
    if fast:
        loaded = make_fast(loaded)
    use_memory(loaded, recipe.memory)
    loaded.size = recipe.model.size
    return loaded


def image_predictor(
    model: str | Path, overrides: Sequence[str] = (), *, device: str | torch.device = "cpu", fast: bool = False
) -> SAM2ImagePredictor:
    """`sam2`'s `SAM2ImagePredictor` over any MODEL, at the model's own resolution. Arguments and errors as `load`.

    Example:
        >>> import numpy as np
        >>> predictor = qsam2.image_predictor("nano")
        >>> predictor.set_image(np.zeros((240, 320, 3), dtype=np.uint8))
        >>> masks, scores, logits = predictor.predict(np.array([[160, 120]]), np.array([1]))
        >>> masks.shape  # three masks of the click, with the IoU that is predicted of each in `scores`
        (3, 240, 320)
    """
    return predictor_of(load(model, overrides, device=device, fast=fast))


def video_predictor(
    model: str | Path, overrides: Sequence[str] = (), *, device: str | torch.device = "cpu", fast: bool = False
) -> SAM2:
    """A model with the interface of `sam2`'s `SAM2VideoPredictor` that holds no more of a video than it still needs.

    `init_state` takes a folder of frames (pictures) or a video file (`open_video`), or frames. Masks are those of
    `sam2`'s predictor, but the state is bounded: new objects can be prompted on any frame, an object can be corrected
    on its latest 32 frames (`memory.correctable`), and what reads a forgotten frame is a UserError
    (`overrides=["memory.bounded=false"]` keeps everything, as `sam2` does). Arguments and errors as `load`.

    Example:
        >>> predictor = qsam2.video_predictor("nano")
        >>> state = predictor.init_state("frames")  # a folder of frames, or a video file
        >>> _ = predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[48, 32]], labels=[1])
        >>> for frame, objects, logits in predictor.propagate_in_video(state):
        ...     masks = logits[:, 0] > 0  # (objects, height, width)
    """

    def read_video(path: str | Path, image_size: int) -> tuple[Sequence[Tensor], tuple[int, int]]:
        video = open_video(path)
        return FrameSequence(video, image_size, len(video)), video.size

    predictor = load(model, ["memory.bounded=true", *overrides], device=device, fast=fast)
    predictor.video_reader = read_video
    return predictor


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is none that PyTorch knows: give cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; give cpu")
    return found


def predictor_of(model: SAM2) -> SAM2ImagePredictor:
    """`sam2`'s image predictor over our model, at the model's own resolution (`sam2` assumes 1024 px)."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor  # imports torchvision, which takes a second

    predictor = SAM2ImagePredictor(model)
    side = model.image_size // 4
    predictor._bb_feat_sizes = [(side >> level, side >> level) for level in range(3)]
    return predictor


@torch.inference_mode(False)
def load_float(recipe: Recipe) -> SAM2:
    """The float model that a recipe starts from; raises UserError as `load_sam2`."""
    drop_path = recipe.train.drop_path if recipe.train else 0.0
    model = load_sam2(**recipe.model.model_dump(), drop_path_rate=drop_path)
    if recipe.model.checkpoint is None:
        initialise(model, recipe.seed)
    return model
