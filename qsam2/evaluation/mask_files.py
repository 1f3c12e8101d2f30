"""Masks as files, in the layouts of the benchmark servers of DAVIS and SA-V: scored against true ones, and written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from qsam2.data.index_masks import VOID, MaskFiles
from qsam2.data.pictures import by_stem, list_pictures, subfolders
from qsam2.data.video import Predictions, Video
from qsam2.errors import UserError
from qsam2.evaluation.metrics.scores import Protocol, VOSScore
from qsam2.evaluation.tracking import say_left_out
from qsam2.output import listed, writing
from qsam2.recipe.recipe import EvaluateRecipe

LAYOUT = {"davis": "SEQUENCE/FRAME.png with object ids as pixel values", "sav": "SEQUENCE/OBJECT/FRAME.png"}
PALETTE = [
    sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
    for index in range(256)
    for channel in range(3)
]
"""Colours of object ids, red, green, blue in turn: each bit of an id sets the highest free bit of a channel."""


def score_folders(pred: Path | str, gt: Path | str, protocol: Protocol) -> dict[str, Any]:
    """Score all sequences below ``gt`` by ``protocol``; see VOSScore.compute.

    ``davis``: ``SEQUENCE/FRAME.png``, object ids as pixel values, as the readers of data take them (see MaskFiles); the
    objects are those of the true masks. ``sav``: ``SEQUENCE/OBJECT/FRAME.png``, one object per file; ground truth says
    which objects and frames count. Files are put in order and paired by name without suffix, ``2`` before ``10``. The
    first and the last true frame need no prediction. Predictions without a true mask are left out, which the block
    says. Raises UserError, naming the file, if a prediction is missing, has another shape or an object that is in no
    true mask, and on empty folders and unreadable pictures.
    """
    score = VOSScore(protocol)
    pred, gt = Path(pred), Path(gt)
    objects = _davis_objects if protocol == "davis" else _sav_objects
    for name in tqdm(_sequences(pred, gt, protocol), desc="J&F", unit="sequence", delay=2, disable=None):
        stray: set[str] = set()  # names of predicted frames without a true one
        for object_id, pred_masks, true_masks in objects(pred / name, gt / name, stray):
            score.update(name, object_id, pred_masks, true_masks)
        if stray:
            score.leave_out(
                name, f"{_count(len(stray), 'predicted frame')} without a true one: {listed(sorted(stray))}"
            )
        if protocol == "sav" and (more := sorted({*subfolders(pred / name)} - {*subfolders(gt / name)})):
            score.leave_out(name, f"{_count(len(more), 'predicted object')} without true masks: {listed(more)}")
    block = score.compute()
    say_left_out(block)
    return block


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


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


def _davis_objects(pred: Path, gt: Path, stray: set[str]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    true_files, pred_files = _pair(gt, pred, "davis", stray)
    pred_ids, true_ids = _read_pairs(true_files, pred_files)
    objects = _present(true_ids)
    if not objects:
        raise UserError(f"{gt}: no object in any mask; davis scores ids from 1 on (in 8 bits {VOID} is void)")
    for name, ids in zip(true_files.paths, pred_ids, strict=True):
        if unknown := sorted({*_present(ids)} - {*objects}):
            known = listed([str(item) for item in objects])
            raise UserError(
                f"{pred_files.paths[name]}: object id {unknown[-1]}, but the masks in {gt} have {known}; "
                "predict only those"
            )
    for object_id in objects:
        yield object_id, pred_ids == object_id, true_ids == object_id


def _sav_objects(pred: Path, gt: Path, stray: set[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    object_ids = subfolders(gt)
    if not object_ids:
        raise UserError(f"{gt}: no object folders; sav ground truth is laid out as {LAYOUT['sav']}")
    for object_id in object_ids:
        true_files, pred_files = _pair(gt / object_id, pred / object_id, "sav", stray)
        pairs = _read_pairs(true_files, pred_files)
        for files, masks in zip((pred_files, true_files), pairs, strict=True):
            for name, ids in zip(true_files.paths, masks, strict=True):
                if len(_present(ids)) > 1:
                    raise UserError(
                        f"{files.paths[name]}: more than one object; sav masks have one object a file: {LAYOUT['sav']}"
                    )
        yield object_id, pairs[0] > 0, pairs[1] > 0


def _present(ids: np.ndarray) -> list[int]:
    """The object ids of masks, in order."""
    return [int(item) for item in np.flatnonzero(np.bincount(ids.ravel())) if item]


def _pair(gt: Path, pred: Path, protocol: Protocol, stray: set[str]) -> tuple[_Frames, _Frames]:
    """The true and the predicted files of a folder; names of predictions without a true mask go into `stray`."""
    true_files, pred_files = by_stem(list_pictures(gt)), by_stem(list_pictures(pred))
    if not true_files:
        raise UserError(f"{gt}: no PNG files; {protocol} ground truth is laid out as {LAYOUT[protocol]}")
    stray |= pred_files.keys() - true_files.keys()
    scored = {name: pred_files[name] for name in true_files if name in pred_files}
    dataset = 1 if protocol == "sav" else 0
    return _Frames(gt, true_files, gt.parents[dataset]), _Frames(pred, scored, pred.parents[dataset])


class _Frames:
    """The mask files of a folder by name; what their values mean is decided by them alone."""

    def __init__(self, folder: Path, paths: dict[str, Path], dataset: Path) -> None:
        self.folder, self.paths, self._files = folder, paths, MaskFiles([*paths.values()], dataset)

    def read(self, name: str) -> np.ndarray:
        """Object ids (H, W)."""
        path = self.paths.get(name)
        if path is None:
            raise UserError(
                f"{self.folder / name}.png: missing; all annotated frames but the first and last need a prediction of "
                "that name"
            )
        return self._files.read(path)


def _read_pairs(true: _Frames, pred: _Frames) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true ids (T, H, W); the first and last prediction, which are not scored, are 0.

    An object that no true mask shows, which nothing can track, needs no predictions: they are 0, too.
    """
    names = list(true.paths)
    true_frames = [true.read(name) for name in names]
    shape = true_frames[0].shape
    pred_frames = [np.zeros_like(frame) for frame in true_frames]
    untracked = not pred.paths and not any(frame.any() for frame in true_frames)
    for t, name in enumerate(names):
        if true_frames[t].shape != shape:
            raise UserError(
                f"{true.paths[name]}: {_size(true_frames[t])}, but {true.paths[names[0]]} is "
                f"{_size(true_frames[0])}; correct it"
            )
        if 0 < t < len(names) - 1 and not untracked:
            pred_frames[t] = pred.read(name)
            if pred_frames[t].shape != shape:
                raise UserError(
                    f"{pred.paths[name]}: {_size(pred_frames[t])}, but {true.paths[name]} is {_size(true_frames[t])}; "
                    "write predictions at the size of the ground truth, nothing is resized"
                )
    return np.stack(pred_frames), np.stack(true_frames)


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]}x{mask.shape[0]} pixels"


def check_masks_folder(folder: Path, videos: Sequence[Video]) -> None:
    """Raise UserError unless masks can be written: a new folder, videos that are tracked and have names of folders."""
    if strange := [video.name for video in videos if video.name in ("", ".", "..") or "/" in video.name]:
        raise UserError(f"--save-masks: a video is called {strange[0]!r}, which is no folder's name: rename it")
    if folder.exists():
        raise UserError(f"--save-masks {folder}: exists already; give a new folder")
    if all(len(video) == 1 for video in videos):
        raise UserError("--save-masks writes tracked masks, but the data holds pictures: give videos")


def write_masks(folder: Path, videos: Sequence[Video], predictions: Predictions, evaluation: EvaluateRecipe) -> None:
    """Write all masks, or none: `VIDEO/FRAME.png` of object ids (davis), or `VIDEO/OBJECT/FRAME.png` (sav).

    In sav, object 1 is folder 000, as SA-V names them; in davis, the object with the lowest id has a pixel of several,
    and ids from 255 on make grey pictures of 16 bits.

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
        ids = np.zeros(video.size, np.uint8 if max(masks, default=0) < VOID else np.uint16)
        for item in sorted(masks, reverse=True):
            if evaluation.protocol == "sav":
                _write(folder / f"{item - 1:03d}" / f"{name}.png", masks[item][index])
            ids[masks[item][index] > 0] = item
        if evaluation.protocol == "davis":
            _write(folder / f"{name}.png", ids)


def _write(file: Path, ids: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids)
    if ids.dtype == np.uint8:
        picture = picture.convert("P")
        picture.putpalette(PALETTE)
    picture.save(file)
