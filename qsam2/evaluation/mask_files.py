"""Masks as files, in the layouts of the benchmark servers of DAVIS and SA-V: scored against true ones, and written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from qsam2.data.pictures import subfolders
from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.evaluation.metrics.scores import Protocol, VOSScore
from qsam2.output import listed, writing
from qsam2.recipe.recipe import EvaluateRecipe

VOID = 255
LAYOUT = {"davis": "SEQUENCE/FRAME.png with object ids as pixel values", "sav": "SEQUENCE/OBJECT/FRAME.png"}
PALETTE = [
    sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
    for index in range(256)
    for channel in range(3)
]
"""Colours of object ids, red, green, blue in turn: each bit of an id sets the highest free bit of a channel."""


def score_folders(pred: Path | str, gt: Path | str, protocol: Protocol) -> dict[str, Any]:
    """Score all sequences below ``gt`` by ``protocol``; see VOSScore.compute.

    ``davis``: ``SEQUENCE/FRAME.png``, a palette or grey image of object ids, 255 in ground truth is void; the objects
    are ids 1 to the maximum of the first true frame. ``sav``: ``SEQUENCE/OBJECT/FRAME.png``, one object per file;
    ground truth says which objects and frames count. The first and the last true frame need no prediction. Raises
    UserError, naming the file, if a prediction is missing, has another shape or more objects than the ground truth, and
    on empty folders and unreadable PNGs.
    """
    score = VOSScore(protocol)
    pred, gt = Path(pred), Path(gt)
    objects = _davis_objects if protocol == "davis" else _sav_objects
    for name in tqdm(_sequences(pred, gt, protocol), desc="J&F", unit="sequence", delay=2, disable=None):
        for object_id, pred_masks, true_masks in objects(pred / name, gt / name):
            score.update(name, object_id, pred_masks, true_masks)
    return score.compute()


def _sequences(pred: Path, gt: Path, protocol: Protocol) -> list[str]:
    for folder in (gt, pred):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the one that holds the sequences")
    names, pred_names = subfolders(gt), subfolders(pred)
    if not names:
        raise UserError(f"{gt}: no sequence folders; {protocol} ground truth is laid out as {LAYOUT[protocol]}")
    if missing := sorted(set(names) - set(pred_names)):
        raise UserError(f"{pred}: no predictions for {listed(missing)}; predict every sequence")
    if extra := sorted(set(pred_names) - set(names)):
        raise UserError(f"{pred}: {listed(extra)} not in ground truth {gt}; remove them")
    return names


def _davis_objects(pred: Path, gt: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    files = _frames(gt, "davis")
    pred_ids, true_ids = _read_frames(files, pred, _read_ids)
    true_ids[true_ids == VOID] = 0
    objects = int(true_ids[0].max())
    if not objects:
        raise UserError(f"{files[0]}: no object; davis scores ids 1 to 254 of the first frame ({VOID} is void)")
    for file, ids in zip(files, pred_ids, strict=True):
        if ids.max() > objects:
            raise UserError(
                f"{pred / file.name}: object id {ids.max()}, but {files[0]} has ids 1 to {objects}; predict only those"
            )
    for object_id in range(1, objects + 1):
        yield object_id, pred_ids == object_id, true_ids == object_id


def _sav_objects(pred: Path, gt: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    object_ids = subfolders(gt)
    if not object_ids:
        raise UserError(f"{gt}: no object folders; sav ground truth is laid out as {LAYOUT['sav']}")
    for object_id in object_ids:
        yield object_id, *_read_frames(_frames(gt / object_id, "sav"), pred / object_id, _read_mask)


def _frames(folder: Path, protocol: Protocol) -> list[Path]:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"{folder}: no PNG files; {protocol} ground truth is laid out as {LAYOUT[protocol]}")
    return files


def _read_frames(files: list[Path], pred: Path, read: Callable[[Path], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true frames (T, H, W); the first and last prediction, which are not scored, are 0."""
    true_frames = [read(file) for file in files]
    shape = true_frames[0].shape
    pred_frames = [np.zeros_like(frame) for frame in true_frames]
    for t, file in enumerate(files):
        if true_frames[t].shape != shape:
            raise UserError(f"{file}: {_size(true_frames[t])}, but {files[0]} is {_size(true_frames[0])}; correct it")
        if 0 < t < len(files) - 1:
            pred_frames[t] = read(pred / file.name)
            if pred_frames[t].shape != shape:
                raise UserError(
                    f"{pred / file.name}: {_size(pred_frames[t])}, but {file} is {_size(true_frames[t])}; "
                    "write predictions at the size of the ground truth, nothing is resized"
                )
    return np.stack(pred_frames), np.stack(true_frames)


def _read_ids(path: Path) -> np.ndarray:
    """Object ids of a palette, grey or binary PNG: uint8 (H, W)."""
    if not path.is_file():
        raise UserError(f"{path}: missing; all annotated frames but the first and last need a prediction of that name")
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError on a broken PNG chunk
        raise UserError(f"{path}: not a readable PNG ({error}); write it again") from error
    if mode not in ("P", "L", "1"):
        raise UserError(f"{path}: PNG of mode {mode}; masks are 8-bit palette or grey images with one id per pixel")
    return ids.astype(np.uint8)


def _read_mask(path: Path) -> np.ndarray:
    """The one object of a PNG: bool (H, W)."""
    ids = _read_ids(path)
    mask = ids > 0
    if (ids[mask] != ids.max()).any():
        raise UserError(f"{path}: more than one object; sav masks have one object per file: {LAYOUT['sav']}")
    return mask


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]}x{mask.shape[0]} pixels"


def check_masks_folder(folder: Path, videos: Sequence[Video]) -> None:
    """Raise UserError unless masks can be written: a new folder, videos that are tracked."""
    if folder.exists():
        raise UserError(f"--save-masks {folder}: exists already; give a new folder")
    if all(len(video) == 1 for video in videos):
        raise UserError("--save-masks writes tracked masks, but the data holds pictures: give videos")


def write_masks(folder: Path, videos: Sequence[Video], predictions: Predictions, evaluation: EvaluateRecipe) -> None:
    """Write all masks, or none: `VIDEO/FRAME.png` of object ids (davis), or `VIDEO/OBJECT/FRAME.png` (sav).

    In sav, object 1 is folder 000, as SA-V names them; in davis, the object with the lowest id has a pixel of several.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        with writing(folder):
            for video in videos:
                _write_video(unfinished / video.name, video, predictions, evaluation)
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_video(folder: Path, video: Video, predictions: Predictions, evaluation: EvaluateRecipe) -> None:
    names = video.frame_names[: evaluation.frames]
    shape = (len(names), *video.size)
    masks = {
        item: np.unpackbits(packed, count=np.prod(shape)).reshape(shape)
        for (name, item), packed in predictions.items()
        if name == video.name
    }
    for index, name in enumerate(names):
        ids = np.zeros(video.size, np.uint8)
        for item in sorted(masks, reverse=True):
            if evaluation.protocol == "sav":
                _write(folder / f"{item - 1:03d}" / f"{name}.png", masks[item][index])
            ids[masks[item][index] > 0] = item
        if evaluation.protocol == "davis":
            _write(folder / f"{name}.png", ids)


def _write(file: Path, ids: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette(PALETTE)
    picture.save(file)
