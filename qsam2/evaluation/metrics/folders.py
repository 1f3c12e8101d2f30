"""J&F of predictions on disk, in the layouts of DAVIS-2017 and SA-V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from qsam2.errors import UserError
from qsam2.evaluation.metrics.vos import Protocol, VOSScore, check_protocol
from qsam2.output import listed

VOID = 255
LAYOUT = {"davis": "SEQUENCE/FRAME.png with object ids as pixel values", "sav": "SEQUENCE/OBJECT/FRAME.png"}


def score_folders(
    pred: Path | str, gt: Path | str, protocol: Protocol, *, sequences: Sequence[str] | None = None
) -> dict[str, Any]:
    """Score all sequences below ``gt``, or only ``sequences`` (e.g. one split), by ``protocol``; see VOSScore.compute.

    ``davis``: ``SEQUENCE/FRAME.png``, a palette or grey image of object ids, 255 in ground truth is void; the objects
    are ids 1 to the maximum of the first true frame. ``sav``: ``SEQUENCE/OBJECT/FRAME.png``, one object per file;
    ground truth says which objects and frames count. The first and the last true frame need no prediction. Raises
    UserError, naming the file, if a prediction is missing, has another shape or more objects than the ground truth, and
    on empty folders and unreadable PNGs.
    """
    check_protocol(protocol)
    pred, gt = Path(pred), Path(gt)
    names = _sequences(pred, gt, protocol, sequences)
    objects = _davis_objects if protocol == "davis" else _sav_objects
    score = VOSScore(protocol, sync_on_compute=False)  # the folder is whole on every rank
    for name in tqdm(names, desc="J&F", unit="sequence", delay=2, disable=None):
        for object_id, pred_masks, true_masks in objects(pred / name, gt / name):
            score.update(name, object_id, pred_masks, true_masks)
    return score.compute()


def _sequences(pred: Path, gt: Path, protocol: Protocol, wanted: Sequence[str] | None) -> list[str]:
    true_names, pred_names = _subfolders(gt), _subfolders(pred)
    if not true_names:
        raise UserError(f"{gt}: no sequence folders; {protocol} ground truth is laid out as {LAYOUT[protocol]}")
    if wanted is not None and (unknown := sorted(set(wanted) - set(true_names))):
        raise UserError(f"{gt}: no ground truth for sequence {unknown[0]}; it has {listed(true_names)}")
    names = true_names if wanted is None else list(wanted)
    if missing := sorted(set(names) - set(pred_names)):
        raise UserError(f"{pred}: no predictions for {listed(missing)}; predict every sequence or name those to score")
    if wanted is None and (extra := sorted(set(pred_names) - set(true_names))):
        raise UserError(f"{pred}: {listed(extra)} not in ground truth {gt}; remove them or name the sequences to score")
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
    object_ids = _subfolders(gt)
    if not object_ids:
        raise UserError(f"{gt}: no object folders; sav ground truth is laid out as {LAYOUT['sav']}")
    for object_id in object_ids:
        yield object_id, *_read_frames(_frames(gt / object_id, "sav"), pred / object_id, _read_mask)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the sequences")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


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
